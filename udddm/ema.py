"""Exponential moving averages of the weights, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class EMA:
    """One average of `live` float32 weights (what this rank keeps of them: `Engine.weights`), updated after every step
    as w <- decay w + (1 - decay) p."""

    def __init__(self, live: Mapping[str, torch.Tensor], decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self._live = dict(live)
        self.weights = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` counts from 1; with warm-up the decay is at most (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        if self.weights:  # a rank may keep no part of a small network
            torch._foreach_lerp_(list(self.weights.values()), [p.float() for p in self._live.values()], 1 - decay)
