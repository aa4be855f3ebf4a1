"""Write a file in the format of EDM's network snapshots, with random weights, and the denoiser's outputs.

    python edm_snapshot.py FOLDER '{"classes": 4, "channels": [32, [1, 2]], "blocks": 1, "variants": {}}'

writes snapshot.pkl, outputs.npz, and a file for each variant, which has its changes (module, attribute, value) and
those of the variants before it.

The tests run this in a separate process, so that none of these classes exists where the file is read. The classes have
the names, attributes and pickled form of those in github.com/NVlabs/edm, and compute what Karras et al. 2022 (arXiv
2206.00364, Table 1 and Appendix F) describe.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SIDE, ATTENDED = 8, 4


def module(name: str) -> types.ModuleType:
    found = sys.modules[name] = types.ModuleType(name)
    return found


def reconstruct(meta: dict[str, Any]) -> Any:
    raise NotImplementedError("these files are only written")


module("torch_utils")
persistence = module("torch_utils.persistence")
reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
persistence._reconstruct_persistent_obj = reconstruct  # type: ignore[attr-defined]
module("dnnlib")


class EasyDict(dict[str, Any]):
    """A dict whose class has to be named in the file."""


EasyDict.__module__ = "dnnlib.util"
module("dnnlib.util").EasyDict = EasyDict  # type: ignore[attr-defined]


class Persistent(nn.Module):
    """Pickled as a call with the source code of its module, its name and its state."""

    def __init__(self, **arguments: Any):
        super().__init__()
        self._init_args, self._init_kwargs = (), EasyDict(arguments)

    def __reduce__(self) -> Any:
        source = "import os\nos.abort()  # executed by a reader that trusts the file\n"
        meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": type(self).__name__,
            "state": dict(self.__dict__),
        }
        return reconstruct, (meta,), None


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.5))


class Linear(Persistent):
    def __init__(self, into: int, out: int, bias: bool = True):
        super().__init__()
        self.weight, self.bias = weights(out, into), weights(out) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(Persistent):
    def __init__(self, into: int, out: int, kernel: int, how: str = ""):
        super().__init__()
        self.up, self.down = how == "up", how == "down"
        self.weight, self.bias = weights(out, into, kernel, kernel), weights(out)
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if how else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if self.down:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(Persistent):
    def __init__(self, channels: int):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), 1e-6
        self.weight, self.bias = weights(channels), weights(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class UNetBlock(Persistent):
    def __init__(self, into: int, out: int, width: int, how: str = "", attends: bool = False):
        super().__init__()
        self.in_channels, self.adaptive_scale, self.num_heads = into, False, int(attends)
        self.skip_scale = np.sqrt(0.5)  # a NumPy scalar, as in EDM
        self.norm0, self.conv0 = GroupNorm(into), Conv2d(into, out, 3, how)
        self.affine, self.norm1, self.conv1 = Linear(width, out), GroupNorm(out), Conv2d(out, out, 3)
        self.skip = Conv2d(into, out, 1, how) if into != out or how else None
        if attends:
            self.norm2, self.qkv, self.proj = GroupNorm(out), Conv2d(out, 3 * out, 1), Conv2d(out, out, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[..., None, None]
        h = self.conv1(F.silu(self.norm1(h)))
        x = (h + (x if self.skip is None else self.skip(x))) * float(self.skip_scale)
        if not self.num_heads:
            return x
        joint = self.qkv(self.norm2(x)).flatten(2)
        query, key, value = joint[:, 0::3], joint[:, 1::3], joint[:, 2::3]
        shares = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(x.shape[1]), dim=2)
        attended = (value @ shares.transpose(1, 2)).view(x.shape)
        return (x + self.proj(attended)) * float(self.skip_scale)


class PositionalEmbedding(Persistent):
    def __init__(self, channels: int):
        super().__init__()
        self.num_channels = channels

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        angle = level[:, None] * 10000.0 ** -(torch.arange(half) / (half - 1))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class SongUNet(Persistent):
    def __init__(self, classes: int, width: int, multipliers: list[int], blocks: int, **more: Any):
        super().__init__(
            model_channels=width, channel_mult=multipliers, num_blocks=blocks, attn_resolutions=[ATTENDED], **more
        )
        self.map_noise = PositionalEmbedding(width)
        self.map_label = Linear(classes, width) if classes else None
        self.map_augment = Linear(9, width, bias=False)
        self.map_layer0, self.map_layer1 = Linear(width, 4 * width), Linear(4 * width, 4 * width)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        now, skips, sides = width, [width], [SIDE >> stage for stage in range(len(multipliers))]
        for stage, (side, multiplier) in enumerate(zip(sides, multipliers, strict=True)):
            if not stage:
                self.enc[f"{side}x{side}_conv"] = Conv2d(3, width, 3)
            else:
                self.enc[f"{side}x{side}_down"] = UNetBlock(now, now, 4 * width, "down")
                skips.append(now)
            for index in range(blocks):
                into, now = now, width * multiplier
                self.enc[f"{side}x{side}_block{index}"] = UNetBlock(into, now, 4 * width, attends=side == ATTENDED)
                skips.append(now)
        for stage, (side, multiplier) in reversed(list(enumerate(zip(sides, multipliers, strict=True)))):
            if stage == len(sides) - 1:
                self.dec[f"{side}x{side}_in0"] = UNetBlock(now, now, 4 * width, attends=True)
                self.dec[f"{side}x{side}_in1"] = UNetBlock(now, now, 4 * width)
            else:
                self.dec[f"{side}x{side}_up"] = UNetBlock(now, now, 4 * width, "up")
            for index in range(blocks + 1):
                into, now = now + skips.pop(), width * multiplier
                attends = index == blocks and side == ATTENDED
                self.dec[f"{side}x{side}_block{index}"] = UNetBlock(into, now, 4 * width, attends=attends)
        self.dec[f"{SIDE}x{SIDE}_aux_norm"] = GroupNorm(now)
        self.dec[f"{SIDE}x{SIDE}_aux_conv"] = Conv2d(now, 3, 3)

    def forward(self, x: torch.Tensor, level: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
        embedding = self.map_noise(level)
        if self.map_label is not None:
            embedding = embedding + self.map_label(one_hot * math.sqrt(one_hot.shape[1]))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        skips: list[torch.Tensor] = []
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        *blocks, norm, out = self.dec.values()
        for layer in blocks:
            x = layer(x if x.shape[1] == layer.in_channels else torch.cat([x, skips.pop()], dim=1), embedding)
        found: torch.Tensor = out(F.silu(norm(x)))
        return found


class EDMPrecond(Persistent):
    def __init__(self, classes: int, model: SongUNet):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.sigma_data = SIDE, 3, classes, 0.5
        self.model = model

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
        """D(x; sigma), Table 1."""
        total = (sigma**2 + self.sigma_data**2)[:, None, None, None]
        s = sigma[:, None, None, None]
        inner = self.model(x / total.sqrt(), sigma.log() / 4, one_hot)
        found: torch.Tensor = self.sigma_data**2 / total * x + s * self.sigma_data / total.sqrt() * inner
        return found


def main(folder: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    main_module = sys.modules[__name__]
    for kind in [each for each in vars(main_module).values() if isinstance(each, type)]:
        if issubclass(kind, Persistent):
            kind.__module__ = "training.networks"
    classes, (width, multipliers), blocks = options["classes"], options["channels"], options["blocks"]
    network = SongUNet(classes, width, multipliers, blocks, dropout=0.13, augment_dim=9)
    ema = EDMPrecond(classes, network).eval().requires_grad_(False)
    x = 3 * torch.randn(5, 3, SIDE, SIDE)
    sigma, labels = torch.tensor([0.002, 0.1, 1.0, 10.0, 80.0]), torch.arange(5) % (classes + 1)
    one_hot = F.one_hot(labels, classes + 1)[:, :classes].float()
    np.savez(folder / "outputs.npz", x=x, sigma=sigma, labels=labels, denoised=ema(x, sigma, one_hot))
    loss, dataset = Persistent(P_mean=-1.2), EasyDict(path="data.zip", cache=True)
    for name, changes in {"": [], **options["variants"]}.items():
        for part, attribute, value in changes:
            setattr(ema.get_submodule(part), attribute, value)
        with (folder / f"{name or 'snapshot'}.pkl").open("wb") as file:
            pickle.dump({"ema": ema, "loss_fn": loss, "dataset_kwargs": dataset}, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
