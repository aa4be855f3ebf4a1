"""Averages of the weights, in float32: exponential ones, and Karras et al.'s with power-function profiles (EDM2)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch

from udddm.config import TrainConfig


class Average(ABC):
    """An average of `live` float32 weights (what this rank keeps of them: `Engine.weights`), moved after every step."""

    def __init__(self, live: Mapping[str, torch.Tensor]):
        self._live = dict(live)
        self.weights = {name: p.detach().float().clone() for name, p in self._live.items()}

    @property
    @abstractmethod
    def name(self) -> str:
        """What checkpoints call it: the file is `ema-<name>.safetensors`."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """The share of the new weights after step `step`, which counts from 1."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """w <- w + rate (p - w)."""
        if self.weights:  # a rank may keep no part of a small network
            live = [p.float() for p in self._live.values()]
            torch._foreach_lerp_(list(self.weights.values()), live, self.rate(step))


class EMA(Average):
    """w <- decay w + (1 - decay) p; with warm-up the decay is at most (1 + step) / (10 + step)."""

    def __init__(self, live: Mapping[str, torch.Tensor], decay: float, warmup: bool = False):
        super().__init__(live)
        self.decay, self.warmup = decay, warmup

    @property
    def name(self) -> str:
        return f"{self.decay:g}"

    def rate(self, step: int) -> float:
        return 1 - (min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay)


class PowerEMA(Average):
    """The weights after step k of n in proportion to k^gamma: its memory grows with the run (Karras et al. 2024, arXiv
    2312.02696, section 3.1). `length` is sigma_rel, the standard deviation of that profile over n.

    w <- beta w + (1 - beta) p with beta = (1 - 1/n)^(gamma + 1), which is 0 at the first step.
    """

    def __init__(self, live: Mapping[str, torch.Tensor], length: float):
        super().__init__(live)
        self.length, self.exponent = length, exponent(length)

    @property
    def name(self) -> str:
        return f"power-{self.length:g}"

    def rate(self, step: int) -> float:
        return 1.0 if step == 1 else -math.expm1((self.exponent + 1) * math.log1p(-1 / step))


def relative_length(exponent: float) -> float:
    """sigma_rel of the profile t^gamma on [0, 1], whose mean is (gamma + 1) / (gamma + 2): its standard deviation."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def exponent(length: float) -> float:
    """gamma of sigma_rel in (0, 1/sqrt(12)), the lengths of gamma = infinity and 0. Raises ValueError for others.

    (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 has one root that is not negative.
    """
    if not 0 < length < math.sqrt(1 / 12):
        raise ValueError(f"a relative length is above 0 and below 0.2887, not {length:g}")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def build(config: TrainConfig, live: Mapping[str, torch.Tensor]) -> list[Average]:
    """The configured averages, in the order of `TrainConfig.averages`."""
    plain = [EMA(live, decay, config.ema_warmup) for decay in config.ema]
    return [*plain, *(PowerEMA(live, length) for length in config.power_ema)]
