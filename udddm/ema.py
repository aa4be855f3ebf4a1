"""Exponential moving averages of the weights, in float32."""

from __future__ import annotations

import torch
from torch import nn


class EMA:
    """One average of `module`'s parameters, updated as w <- decay w + (1 - decay) p after every step."""

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self._live = dict(module.named_parameters())
        self.weights = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` counts from 1; with warm-up the decay is at most (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(list(self.weights.values()), [p.float() for p in self._live.values()], 1 - decay)
