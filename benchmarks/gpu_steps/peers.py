"""What our speed is held against: a hand-written loop, and another library's network of as many parameters."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from gpu_steps.common import Shape, parameters

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class BareLoop:
    """A denoiser's training step written by hand: autocast, loss scaling, fused Adam; no order, store or averages.

    The network is called as `network(images, levels)` and gives a tensor or an object with `sample`.
    """

    def __init__(
        self, network: nn.Module, shape: Shape, device: torch.device, batch: int, precision: str, compiled: bool = False
    ):
        self.device, self.precision = device, precision
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.network: Any = torch.compile(network) if compiled else network
        self.x0 = torch.rand(batch, *shape, device=device) * 2 - 1

    def step(self) -> None:
        level = torch.rand(len(self.x0), device=self.device) * 2
        noisy = self.x0 + level[:, None, None, None] * torch.randn_like(self.x0)
        with torch.autocast(self.device.type, AUTOCAST.get(self.precision), enabled=self.precision != "fp32"):
            output = self.network(noisy, level)
        output = getattr(output, "sample", output)
        loss = (output.float() - self.x0).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def diffusers_network(wanted: int, small: bool) -> nn.Module | None:
    """diffusers' UNet2DModel for 3x32x32 whose parameters come nearest to `wanted`; None without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    diffusers: Any = importlib.import_module("diffusers")

    def make(width: int) -> nn.Module:
        attention = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
        stages = (1, 2) if small else (1, 2, 2, 2)
        made: nn.Module = diffusers.UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=1 if small else 3,
            block_out_channels=tuple(width * stage for stage in stages),
            down_block_types=attention[: len(stages)],
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(attention[: len(stages)])),
            norm_num_groups=min(32, width // 4),
            attention_head_dim=64 if not small else 8,
        )
        return made

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameters(make(width))

    widths = range(32, 257, 32)
    return make(min(widths, key=lambda width: abs(count(width) - wanted)))
