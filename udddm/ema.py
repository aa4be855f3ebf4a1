"""Moving averages of the weights, in float32: exponential averages, and the power-function averages of EDM2."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch

from udddm.config import TrainConfig


class Average(ABC):
    """A moving average of the `live` float32 weights, updated after every step.

    `live` holds this rank's part of the weights (`Engine.weights`).
    """

    def __init__(self, live: Mapping[str, torch.Tensor]):
        self._live = dict(live)
        self.weights = {name: p.detach().float().clone() for name, p in self._live.items()}

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in checkpoints: the file is `ema-<name>.safetensors`."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """The fraction of the new weights in the average after step `step`, counted from 1."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """w <- w + rate (p - w)."""
        if self.weights:  # a rank may hold no part of a small network
            live = [p.float() for p in self._live.values()]
            torch._foreach_lerp_(list(self.weights.values()), live, self.rate(step))


class EMA(Average):
    """w <- decay w + (1 - decay) p. With `warmup`, the decay is at most (1 + step) / (10 + step)."""

    def __init__(self, live: Mapping[str, torch.Tensor], decay: float, warmup: bool = False):
        super().__init__(live)
        self.decay, self.warmup = decay, warmup

    @property
    def name(self) -> str:
        return f"{self.decay:g}"

    def rate(self, step: int) -> float:
        return 1 - (min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay)


class PowerEMA(Average):
    """An average in which the weights after step k of n have weight proportional to k^gamma (Karras et al. 2024, arXiv
    2312.02696, section 3.1). The averaging window grows with the run.

    `length` is sigma_rel: the standard deviation of that profile, divided by n. The update is
    w <- beta w + (1 - beta) p with beta = (1 - 1/n)^(gamma + 1), which is 0 at the first step. Raises ValueError for a
    length outside of (0, 1/sqrt(12)).
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
    """sigma_rel of an exponent gamma: the standard deviation of the profile t^gamma on [0, 1].

    The mean of that profile is (gamma + 1) / (gamma + 2).
    """
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def exponent(length: float) -> float:
    """The exponent gamma of a relative length sigma_rel in (0, 1/sqrt(12)). Raises ValueError for other lengths.

    The limits are the lengths of gamma = infinity and gamma = 0. The equation (gamma + 2)^2 (gamma + 3) =
    (gamma + 1) / sigma_rel^2 has exactly one root that is not negative.
    """
    if not 0 < length < math.sqrt(1 / 12):
        raise ValueError(f"a relative length must be above 0 and below 0.2887, not {length:g}")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def build(config: TrainConfig, live: Mapping[str, torch.Tensor]) -> list[Average]:
    """The configured averages, in the order of `TrainConfig.averages`."""
    plain = [EMA(live, decay, config.ema_warmup) for decay in config.ema]
    return [*plain, *(PowerEMA(live, length) for length in config.power_ema)]
