"""Eq. 3 and Eq. 4 of the paper, and f itself: what every objective has in common.

An objective answers two questions. `plan` says, on the host and ahead of time, what each visit of a sample is: its
noise level, its noise, the weight of x_0 in its target. `__call__` says, on the device, what the visit's loss is and
what the sample's next x0-state is. `plan` is a pure function of (seed, sample, epoch).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm.process import Coefficients


def pseudo_huber(x: torch.Tensor, y: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """Eq. 4: d(x, y) = sqrt(||x - y||^2 + c^2) - c with the norm over the whole image. [B, C, H, W] twice -> [B].

    `c` is a number or [B]. Written as ||x - y||^2 / (sqrt(||x - y||^2 + c^2) + c), which a large c does not cancel out.
    """
    square = (x - y).square().flatten(1).sum(1)
    return square / ((square + c * c).sqrt() + c)


def adaptive_loss(
    output: torch.Tensor, x0: torch.Tensor, state: torch.Tensor, guide: torch.Tensor, c: float | torch.Tensor
) -> torch.Tensor:
    """Eq. 3 with guide [B] = 1/(n+1): guide * d(f, x0) + (1 - guide) * d(f, state). Returns [B]."""
    return guide * pseudo_huber(output, x0, c) + (1 - guide) * pseudo_huber(output, state, c)


def spread(row: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return row[:, None, None, None]


def add_noise(x0: torch.Tensor, eps: torch.Tensor, at: Coefficients) -> torch.Tensor:
    """x_t = signal x_0 + noise eps, all [B, C, H, W]."""
    return spread(at.signal) * x0 + spread(at.noise) * eps


def denoise(
    network: nn.Module,
    xt: torch.Tensor,
    at: Coefficients,
    condition: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """f = a(t) x_t + b(t) F(condition, x_t, t), in float32. [B, C, H, W]."""
    output: torch.Tensor = network(spread(at.scale) * xt, at.embedding, condition, labels)
    return spread(at.skip) * xt + spread(at.out) * output.float()


@dataclass
class Visits:
    """What a batch of visits is, made on the host by `Objective.plan`."""

    coefficients: torch.Tensor
    """[6, B]: the rows of `Coefficients`."""
    noise_key: torch.Tensor
    """[B] int64: eps is `noise.normal` of it."""
    condition_key: torch.Tensor
    """[B] int64: the conditioning image where it is noise."""
    guide: torch.Tensor
    """[B]: the weight of x_0 in the target, Eq. 3's 1/(n+1)."""
    weight: torch.Tensor
    """[B]: the weight of the loss."""
    huber_c: torch.Tensor
    """[B]: c of Eq. 4."""
    fresh: torch.Tensor
    """[F] int64: the visits whose target is evaluated now, for no state of their chain is stored yet."""
    fresh_coefficients: torch.Tensor
    """[6, F]: the level below, at which it is evaluated."""

    def pinned(self) -> Visits:
        return Visits(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def to(self, device: torch.device) -> Visits:
        """On the device, without waiting for the copy."""
        return Visits(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class Objective(Protocol):
    def plan(self, ids: npt.NDArray[np.int64], epoch: int) -> Visits:
        """The visits of samples `ids` [B] in `epoch`."""

    def evaluated(self, visits: Visits) -> int:
        """How many rows the network evaluates for targets, without gradient."""

    def __call__(
        self,
        network: nn.Module,
        x0: torch.Tensor,
        state: torch.Tensor,
        visits: Visits,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each sample [B], and the next x0-state [B, C, H, W] (detached)."""
