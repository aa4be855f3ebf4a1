"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


@dataclass
class Visits:
    """What a batch of visits is, made on the host by `Objective.plan`."""

    coefficients: torch.Tensor
    """[6, B]: the rows of `Coefficients`."""
    noise_key: torch.Tensor
    """[B] int64: eps is `noise.normal` of it."""
    condition_key: torch.Tensor
    """[B] int64: the conditioning image where it is noise."""
    x0_weight: torch.Tensor
    """[B]: the weight of x_0 in the target, Eq. 3's 1/(n+1)."""
    weight: torch.Tensor
    """[B]: the weight of the loss."""
    huber_c: torch.Tensor
    """[B]: c of Eq. 4."""
    teacher_rows: torch.Tensor
    """[F] int64: the visits whose target is evaluated now, for no state of their chain is stored yet."""
    teacher_coefficients: torch.Tensor
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
