"""Inception-v3 as in the reference code of FID: the TensorFlow graph of 2015-12-05, whose weights are published for
PyTorch.

The network is that of Szegedy et al. (arXiv 1512.00567), with the peculiarities of the graph that FID was defined with
(Heusel et al. 2017, arXiv 1706.08500): average pooling that does not count the padding, maximum pooling in the last
block, 1,008 classes, and resizing to 299x299 as TensorFlow 1 does. Names of modules are those of the published file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

SIDE = 299
"""The height and width of the network's input."""
FEATURES = 2048
LOGITS = 1008

Kernel = tuple[int, int]
Step = tuple[str, int, Kernel, int]
"""A convolution in a branch: its name, output channels, kernel and stride."""


def resize_bilinear(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize images [B, C, H, W], float, to [B, C, height, width] as `tf.image.resize_bilinear` of TensorFlow 1.

    Output pixel i is interpolated at position i * H / height of the input, without a shift by half a pixel and without
    a low-pass filter. Smaller images are therefore moved by up to half a pixel and larger ones are aliased, in every
    FID that was ever computed this way.
    """

    def corners(size: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at = torch.arange(wanted, dtype=torch.float32, device=images.device) * torch.tensor(
            size / wanted, dtype=torch.float32
        )
        low = at.long()
        return low, (low + 1).clamp(max=size - 1), (at - low).to(images.dtype)

    low, high, weight = corners(images.shape[3], width)
    top, bottom, down = corners(images.shape[2], height)
    left, right = images[..., low], images[..., high]
    rows = left + (right - left) * weight
    upper, lower = rows[..., top, :], rows[..., bottom, :]
    return upper + (lower - upper) * down[:, None]


class Convolution(nn.Module):
    """Convolution without bias, batch normalization with the stored statistics, and ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = (0, 0)):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)
        self.bn.num_batches_tracked = None  # a count of training steps, which some files lack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.bn(self.conv(x))
        return found.relu_()


class Mixed(nn.Module):
    """An Inception block: branches whose outputs are concatenated, the last of which pools.

    Args:
        channels: channels of the input.
        branches: convolutions of each branch in order. A pair of steps in a branch reads the same input; their outputs
            are concatenated.
        pooling: the pooling of the last branch.
        pooled: output channels of the 1x1 convolution `branch_pool` after the pooling; 0 for none.
    """

    def __init__(
        self, channels: int, branches: Sequence[Sequence[Step | tuple[Step, Step]]], pooling: nn.Module, pooled: int = 0
    ):
        super().__init__()
        self.branches: list[list[list[str]]] = []
        for branch in branches:
            width, names = channels, []
            for entry in branch:
                steps = [entry] if isinstance(entry[0], str) else list(entry)
                for name, out, kernel, stride in steps:
                    padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
                    self.add_module(name, Convolution(width, out, kernel, stride, padding))
                names.append([step[0] for step in steps])
                width = sum(step[1] for step in steps)
            self.branches.append(names)
        self.pooling = pooling
        self.branch_pool = Convolution(channels, pooled, (1, 1)) if pooled else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for branch in self.branches:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            found.append(y)
        return torch.cat([*found, self.branch_pool(self.pooling(x))], 1)


ONE, THREE, FIVE, WIDE, TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def _block_35(channels: int, pooled: int) -> Mixed:
    """Blocks of 35x35 pixels."""
    five = [("branch5x5_1", 48, ONE, 1), ("branch5x5_2", 64, FIVE, 1)]
    double = [
        ("branch3x3dbl_1", 64, ONE, 1),
        ("branch3x3dbl_2", 96, THREE, 1),
        ("branch3x3dbl_3", 96, THREE, 1),
    ]
    return Mixed(channels, [[("branch1x1", 64, ONE, 1)], five, double], _average(), pooled)


def _to_17(channels: int) -> Mixed:
    """The block between 35x35 and 17x17 pixels."""
    double = [
        ("branch3x3dbl_1", 64, ONE, 1),
        ("branch3x3dbl_2", 96, THREE, 1),
        ("branch3x3dbl_3", 96, THREE, 2),
    ]
    return Mixed(channels, [[("branch3x3", 384, THREE, 2)], double], nn.MaxPool2d(3, 2))


def _block_17(channels: int, inner: int) -> Mixed:
    """Blocks of 17x17 pixels, whose factorized 7x7 convolutions have `inner` channels."""
    single = [("branch7x7_1", inner, ONE, 1), ("branch7x7_2", inner, WIDE, 1), ("branch7x7_3", 192, TALL, 1)]
    double = [
        ("branch7x7dbl_1", inner, ONE, 1),
        ("branch7x7dbl_2", inner, TALL, 1),
        ("branch7x7dbl_3", inner, WIDE, 1),
        ("branch7x7dbl_4", inner, TALL, 1),
        ("branch7x7dbl_5", 192, WIDE, 1),
    ]
    return Mixed(channels, [[("branch1x1", 192, ONE, 1)], single, double], _average(), 192)


def _to_8(channels: int) -> Mixed:
    """The block between 17x17 and 8x8 pixels."""
    single = [("branch3x3_1", 192, ONE, 1), ("branch3x3_2", 320, THREE, 2)]
    double = [
        ("branch7x7x3_1", 192, ONE, 1),
        ("branch7x7x3_2", 192, WIDE, 1),
        ("branch7x7x3_3", 192, TALL, 1),
        ("branch7x7x3_4", 192, THREE, 2),
    ]
    return Mixed(channels, [single, double], nn.MaxPool2d(3, 2))


def _block_8(channels: int, pooling: nn.Module) -> Mixed:
    """Blocks of 8x8 pixels."""
    flat, upright = (1, 3), (3, 1)
    single: list[Step | tuple[Step, Step]] = [
        ("branch3x3_1", 384, ONE, 1),
        (("branch3x3_2a", 384, flat, 1), ("branch3x3_2b", 384, upright, 1)),
    ]
    double: list[Step | tuple[Step, Step]] = [
        ("branch3x3dbl_1", 448, ONE, 1),
        ("branch3x3dbl_2", 384, THREE, 1),
        (("branch3x3dbl_3a", 384, flat, 1), ("branch3x3dbl_3b", 384, upright, 1)),
    ]
    return Mixed(channels, [[("branch1x1", 320, ONE, 1)], single, double], pooling, 192)


class Inception(nn.Module):
    """Images uint8 [B, 3, H, W] to features [B, 2048] (the last pooling) and logits [B, 1008] without their bias.

    The logits are those of `udddm.evaluation.metrics.inception_score`: the reference code of the Inception Score
    (Salimans et al. 2016) multiplies by the weights of the last layer and omits its bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, THREE, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, THREE)
        self.Conv2d_2b_3x3 = Convolution(32, 64, THREE, padding=(1, 1))
        self.Conv2d_3b_1x1 = Convolution(64, 80, ONE)
        self.Conv2d_4a_3x3 = Convolution(80, 192, THREE)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _block_17(768, 128)
        self.Mixed_6c = _block_17(768, 160)
        self.Mixed_6d = _block_17(768, 160)
        self.Mixed_6e = _block_17(768, 192)
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b = _block_8(1280, _average())
        self.Mixed_7c = _block_8(2048, nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(FEATURES, LOGITS)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (resize_bilinear(images.float(), SIDE, SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = nn.functional.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = nn.functional.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T
