"""The VP and VE noise schedules: noise levels, and the coefficients of x_t and of f = a(t) x_t + b(t) F.

Time `t` is a real number in [1, T]; integers are the paper's steps (arXiv 2405.21059, sections 2 and 3.1). Schedules
are computed in float64 on the host. The device only receives the six float32 numbers per sample of `Coefficients`, so a
step neither looks up a schedule nor synchronizes with the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from udddm.config import ScheduleConfig
from udddm.config.plugins import SCHEDULES

Array = npt.NDArray[np.float64]

SIGMA_HIGHEST = 80.0
"""The noise level above which no image is visible (Karras et al. 2022). VP levels between 1 and T end there."""


class Coefficients(NamedTuple):
    """The coefficients of each sample's time: six tensors [B] float32.

    x_t = alpha * x_0 + sigma * eps, and f = c_skip * x_t + c_out * F(c_in * x_t, c_noise).
    """

    alpha: torch.Tensor
    sigma: torch.Tensor
    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


class NoiseSchedule(ABC):
    """The contract of a noise schedule: `sigma`, `signal`, `time`, and `precondition` if it differs from EDM's.

    A custom factory is called with the section `schedule` of the configuration.
    """

    max_frequency: float = 16.0
    """The highest frequency that an embedding of `Coefficients.c_noise` should resolve, in radians per unit. 16 suits
    EDM's ln(sigma) / 4."""
    huber_c: float = 0.00015
    """The paper's value of c in Eq. 4 for this schedule."""

    def __init__(self, config: ScheduleConfig):
        self.config = config
        self.last = float(config.timesteps)

    @abstractmethod
    def sigma(self, t: Array) -> Array:
        """The noise-to-signal ratio of times `t` in [1, T]: sigma_t for VE, sqrt((1 - abar_t) / abar_t) for VP.

        It must be positive and finite, and increase with t.
        """

    @property
    def lowest(self) -> float:
        """The lowest noise level: sigma at t = 1."""
        return float(self.sigma(np.array(1.0)))

    @property
    def highest(self) -> float:
        """The highest noise level: sigma at t = T, but at most SIGMA_HIGHEST."""
        return min(SIGMA_HIGHEST, float(self.sigma(np.array(self.last))))

    @abstractmethod
    def signal(self, t: Array) -> Array:
        """The factor of x_0 in x_t."""

    @abstractmethod
    def time(self, sigma: Array) -> Array:
        """The inverse of `sigma`, clipped to [1, T]."""

    def levels(self, count: int) -> Array:
        """Times t_0 = 1 < t_1 < ... < t_count = T, [count + 1], spaced as in Karras et al. 2022, Eq. 5.

        Levels are nested: level k of `count` is level 2k of `2 * count`.
        """
        rho = self.config.rho
        spaced = np.linspace(self.lowest ** (1 / rho), self.highest ** (1 / rho), count + 1) ** rho
        times = self.time(spaced)
        times[0], times[-1] = 1.0, self.last
        return times

    def coefficients(self, t: Array) -> npt.NDArray[np.float32]:
        """The coefficients of times `t` [B], stacked in the order of `Coefficients`: [6, B] float32."""
        t = np.asarray(t, np.float64)
        sigma, signal = self.sigma(t), self.signal(t)
        skip, out, scale, embedding = self.precondition(t, sigma, signal)
        return np.stack([signal, sigma * signal, skip, out, scale, embedding]).astype(np.float32)

    def precondition(self, t: Array, sigma: Array, signal: Array) -> tuple[Array, Array, Array, Array]:
        """(c_skip, c_out, c_in, c_noise) of times `t` [B] with the given `sigma` and `signal`, each [B].

        The default is that of EDM (Karras et al. 2022, Table 1), applied to x_t / signal = x_0 + sigma eps.
        """
        data = self.config.sigma_data
        total = np.hypot(sigma, data)
        return (data / total) ** 2 / signal, sigma / total * data, 1 / (signal * total), np.log(sigma) / 4


class VarianceExploding(NoiseSchedule):
    """VE: x_t = x_0 + sigma_t eps, with the spacing of Karras et al. 2022, Eq. 5."""

    def sigma(self, t: Array) -> Array:
        c = self.config
        low, high = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
        spaced: Array = low + (np.asarray(t) - 1) / (self.last - 1) * (high - low)
        return spaced**c.rho

    def signal(self, t: Array) -> Array:
        return np.ones_like(t)

    def time(self, sigma: Array) -> Array:
        c = self.config
        low, high = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
        found: Array = 1 + (np.asarray(sigma) ** (1 / c.rho) - low) / (high - low) * (self.last - 1)
        return found.clip(1, self.last)

    def precondition(self, t: Array, sigma: Array, signal: Array) -> tuple[Array, Array, Array, Array]:
        c = self.config
        if c.preconditioning == "edm":
            return super().precondition(t, sigma, signal)
        if c.preconditioning == "paper":
            kappa = c.sigma_min / sigma
        elif c.preconditioning == "linear":
            kappa = c.sigma_data / (sigma + c.sigma_data)
        else:
            kappa = c.sigma_data**2 / (sigma**2 + c.sigma_data**2)
        return kappa, 1 - kappa, 1 / np.hypot(sigma, c.sigma_data), np.log(sigma) / 4


class VariancePreserving(NoiseSchedule):
    """VP: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with linear betas; abar_t is interpolated between steps."""

    huber_c = 0.00014

    def __init__(self, config: ScheduleConfig):
        super().__init__(config)
        betas = np.linspace(config.beta_min, config.beta_max, config.timesteps)
        self._steps = np.arange(1, config.timesteps + 1, dtype=np.float64)
        self._log_alpha_bar = np.cumsum(np.log1p(-betas))
        self.max_frequency = 16.0 if config.preconditioning == "edm" else 1.0

    def _log_abar(self, t: Array) -> Array:
        found: Array = np.interp(t, self._steps, self._log_alpha_bar)
        return found

    def sigma(self, t: Array) -> Array:
        return np.sqrt(np.expm1(-self._log_abar(t)))

    def signal(self, t: Array) -> Array:
        return np.exp(self._log_abar(t) / 2)

    def time(self, sigma: Array) -> Array:
        return np.interp(np.log1p(np.asarray(sigma) ** 2), -self._log_alpha_bar, self._steps)

    def precondition(self, t: Array, sigma: Array, signal: Array) -> tuple[Array, Array, Array, Array]:
        if self.config.preconditioning == "edm":
            return super().precondition(t, sigma, signal)
        one = np.ones_like(t)
        if self.config.preconditioning == "epsilon":  # DDPM's steps are numbered from 0
            return 1 / signal, -sigma, one, 1000 * (t - 1) / self.last
        return one, -one, one, 1000 * t / self.last


def build(config: ScheduleConfig) -> NoiseSchedule:
    """The configured noise schedule. Raises ConfigError."""
    built: NoiseSchedule = SCHEDULES.build(config.kind, config.settings, config)
    return built
