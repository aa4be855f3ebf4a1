"""What our speed is held against: a hand-written loop, and another library's network of as many parameters."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from gpu_steps.workloads import Shape, parameters

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


def diffusers_network(wanted: int, small: bool, dropout: float) -> nn.Module | str:
    """diffusers' UNet2DModel for 3x32x32 whose parameters come nearest to `wanted`, or why there is none."""
    try:
        diffusers: Any = importlib.import_module("diffusers")
        unet = diffusers.UNet2DModel  # imported at first use, with all that it needs
    except (ImportError, RuntimeError) as error:
        return f"cannot be imported: {error}"

    def make(width: int, last: int) -> nn.Module:
        """`last`: the channels of the last stage."""
        attention = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
        stages = (width, last) if small else (width, 2 * width, 2 * width, last)
        made: nn.Module = unet(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=1 if small else 3,
            block_out_channels=stages,
            down_block_types=attention[: len(stages)],
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(attention[: len(stages)])),
            norm_num_groups=8 if small else 32,
            attention_head_dim=64 if not small else 8,
            dropout=dropout,
        )
        return made

    def far(sizes: tuple[int, int]) -> int:
        with torch.device("meta"):
            return abs(parameters(make(*sizes)) - wanted)

    widths = (32, 64) if small else (96, 128)
    return make(*min(((width, 2 * width + 64 * more) for width in widths for more in range(4)), key=far))
