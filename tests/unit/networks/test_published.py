"""`dit` and `ddpmpp` against published parameter counts and against independent implementations, diffusers'."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from udddm.config import NetworkConfig, load_config
from udddm.networks import NetworkContext, assemble, outline
from udddm.networks.dit import positions

LATENTS, CIFAR = (4, 32, 32), (3, 32, 32)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameters_of_dit_are_the_published_ones(size: str, millions: int) -> None:
    """Peebles & Xie 2023, Table 4, patch 2: latents of 256x256 images, 1,000 classes, learned variances."""
    config = NetworkConfig(name="dit", settings={"size": size}, classes=1000, condition="none")
    network = outline(config, LATENTS)
    variances = (network.positions.shape[1] + 1) * 4 * 2**2
    assert round(parameters(network) / 1e6) == round((parameters(network) + variances) / 1e6) == millions
    if size == "XL":  # of the paper's code, which also counts the fixed positions
        assert parameters(network) + variances + network.positions.numel() == 675_129_632


@pytest.mark.parametrize(("classes", "count"), [(0, 55_733_891), (10, 55_735_299)])
def test_parameters_of_ddpmpp_are_those_of_edm(classes: int, count: int) -> None:
    """55.7 M (Karras et al. 2022). `count` is of EDM's code with its augmentation input, which is left out here."""
    network = outline(load_config("cifar10-ddpmpp").network.model_copy(update={"classes": classes}), CIFAR)
    assert parameters(network) + 9 * 128 == count


def test_the_preset_of_dit_is_dit_b_2() -> None:
    config = load_config("imagenet-256-latents-dit")
    assert config.data.expect is not None
    assert round(parameters(outline(config.network, config.data.expect.shape)) / 1e6) == 130


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    found = positions(3, 5, 8).view(3, 5, 8)
    for row in range(3):
        for column in range(5):
            for half, at in ((0, column), (1, row)):
                angles = [at * 10000 ** (-k / 2) for k in range(2)]
                expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                torch.testing.assert_close(found[row, column, 4 * half : 4 * half + 4], torch.tensor(expected))


# diffusers.


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        yield pytest.importorskip("diffusers")


class FromDiffusers(nn.Module):
    """DDPM++ of diffusers' residual blocks and attention, in the order that Karras et al. 2022 describe."""

    def __init__(self, channels: int, width: int, multipliers: tuple[int, ...], blocks: int, classes: int):
        super().__init__()
        self.classes, self.half = classes, width // 2
        self.mlp = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])
        self.label = nn.Linear(classes, width)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up, self.middle = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips, now, last = [width], width, len(multipliers) - 1
        for stage, multiplier in enumerate(multipliers):
            for index in range(blocks + bool(stage)):
                out = now if stage and not index else width * multiplier
                self.down.append(self.block(now, out, stage == 1 and index > 0, down=bool(stage) and not index))
                now = out
                skips.append(now)
        self.middle.extend([self.block(now, now, True), self.block(now, now, False)])
        for stage in range(last, -1, -1):
            if stage < last:
                self.up.append(self.block(now, now, False, up=True))
            for index in range(blocks + 1):
                out = width * multipliers[stage]
                self.up.append(self.block(now + skips.pop(), out, stage == 1 and index == blocks))
                now = out
        self.norm, self.out = nn.GroupNorm(32, now, eps=1e-6), nn.Conv2d(now, channels, 3, padding=1)

    def block(self, into: int, out: int, attends: bool, *, down: bool = False, up: bool = False) -> nn.ModuleList:
        from diffusers.models.attention_processor import Attention, AttnProcessor
        from diffusers.models.resnet import ResnetBlock2D

        residual = ResnetBlock2D(
            in_channels=into, out_channels=out, temb_channels=4 * self.stem.out_channels, groups=32, eps=1e-6,
            skip_time_act=True, output_scale_factor=math.sqrt(2), use_in_shortcut=into != out or down or up,
            down=down, up=up,
        )  # fmt: skip
        if not attends:
            return nn.ModuleList([residual])
        attention = Attention(
            out, heads=1, dim_head=out, rescale_output_factor=math.sqrt(2), eps=1e-6, norm_num_groups=32,
            residual_connection=True, bias=True, processor=AttnProcessor(),
        )  # fmt: skip
        return nn.ModuleList([residual, attention])

    def forward(self, x: torch.Tensor, level: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from diffusers.models.embeddings import get_timestep_embedding

        embedding = get_timestep_embedding(level, 2 * self.half, downscale_freq_shift=1)
        one_hot = F.one_hot(labels, self.classes + 1)[:, : self.classes].float()
        embedding = embedding + self.label(one_hot * math.sqrt(self.classes))
        for linear in self.mlp:
            embedding = F.silu(linear(embedding))
        x = self.stem(x)
        skips = [x]

        def run(parts: nn.Module, x: torch.Tensor) -> torch.Tensor:
            residual, *attention = parts  # type: ignore[misc]
            x = residual(x, embedding)
            return attention[0](x) if attention else x

        for parts in self.down:
            x = run(parts, x)
            skips.append(x)
        for parts in self.middle:
            x = run(parts, x)
        for parts in self.up:
            x = run(parts, x if parts[0].up else torch.cat([x, skips.pop()], 1))  # type: ignore[index]
        return self.out(F.silu(self.norm(x)))

    def in_order(self) -> Iterator[nn.Module]:
        """The layers with weights, in the order of `DDPMpp`."""
        yield from (self.label, *self.mlp, self.stem)
        for parts in (*self.down, *self.middle, *self.up):
            r = parts[0]
            yield from (r.norm1, r.conv1, r.time_emb_proj, r.norm2, r.conv2)
            yield from () if r.conv_shortcut is None else (r.conv_shortcut,)
            yield from parts[1:]
        yield from (self.norm, self.out)


def randomize(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        scale = 0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=scale, generator=generator)


@pytest.mark.parametrize("multipliers", [(1, 2), (2, 1, 1)])
def test_ddpmpp_equals_a_network_of_diffusers_blocks(diffusers: Any, multipliers: tuple[int, ...]) -> None:
    shape, width, blocks, classes = (3, 8, 8), 128, 2, 4
    config = NetworkConfig(
        name="ddpmpp", base_channels=width, channel_mult=multipliers, blocks_per_level=blocks,
        attention_resolutions=(4,), classes=classes, condition="none", dropout=0.1,
    )  # fmt: skip
    ours = assemble(NetworkContext(config, shape, max_frequency=1.0)).eval()
    theirs = FromDiffusers(3, width, multipliers, blocks, classes).eval()
    randomize(ours)
    layers = [m for m in ours.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.GroupNorm))]
    with torch.no_grad():
        left = iter(layers)
        for layer in theirs.in_order():
            if hasattr(layer, "to_q"):
                norm, joint, out = next(left), next(left), next(left)
                pairs = [(layer.group_norm, norm), (layer.to_out[0], out)]
                for part, name in enumerate(("to_q", "to_k", "to_v")):
                    for kind in ("weight", "bias"):
                        getattr(getattr(layer, name), kind).copy_(getattr(joint, kind).chunk(3)[part])
            else:
                pairs = [(layer, next(left))]
            for target, source in pairs:
                target.weight.copy_(source.weight)
                target.bias.copy_(source.bias)
        assert next(left, None) is None
        x, level = torch.randn(5, *shape), torch.tensor([-1.5, -0.3, 0.0, 0.4, 1.1])
        labels = torch.tensor([0, 1, 2, 3, 4])
        found, expected = ours(x, level, None, labels), theirs(x, level, labels)
    assert expected.std() > 0.2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
