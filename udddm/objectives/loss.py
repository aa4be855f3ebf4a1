"""Eq. 3 and Eq. 4 of the paper, and the loss of a visit: what every objective has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from udddm import rng
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients
from udddm.objectives.base import Visits

Estimate = Callable[[Coefficients, slice | torch.Tensor], torch.Tensor]
_ALL = slice(None)


def pseudo_huber(x: torch.Tensor, y: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """Eq. 4: d(x, y) = sqrt(||x - y||^2 + c^2) - c with the norm over the whole image. [B, C, H, W] twice -> [B].

    `c` is a number or [B]. Written as ||x - y||^2 / (sqrt(||x - y||^2 + c^2) + c), which a large c does not cancel out.
    """
    square = (x - y).square().flatten(1).sum(1)
    return square / ((square + c * c).sqrt() + c)


def adaptive_loss(
    output: torch.Tensor, x0: torch.Tensor, state: torch.Tensor, x0_weight: torch.Tensor, c: float | torch.Tensor
) -> torch.Tensor:
    """Eq. 3 with x0_weight [B] = 1/(n+1): x0_weight * d(f, x0) + (1 - x0_weight) * d(f, state). Returns [B]."""
    return x0_weight * pseudo_huber(output, x0, c) + (1 - x0_weight) * pseudo_huber(output, state, c)


@dataclass(frozen=True)
class Teacher:
    """How the network is called for targets, before the call that trains it.

    With dropout both calls drop the same units of a row (Song & Dhariwal 2023, section 3.2; Geng et al. 2024): the
    generator starts both in the same state. A row's place in its sequence depends on the shape of the batch, so both
    calls need all rows. A compiled network needs them too, or it would be compiled for each number of rows.
    """

    every_row: bool = True
    """Evaluate all rows wherever one needs it. Otherwise only those that do."""
    lockstep: bool = False
    """Call the network in every step, needed or not: where calls exchange weights between ranks (ZeRO 3), all must
    make the same ones."""

    def evaluated(self, visits: Visits) -> int:
        """How many rows the network evaluates for the targets of `visits`."""
        needed = len(visits.teacher_rows)
        return len(visits.x0_weight) if self.every_row and needed else needed

    @torch.no_grad()
    def target(self, f: Estimate, state: torch.Tensor, visits: Visits) -> torch.Tensor:
        """The x0-states, with f at the level below in the rows that have no stored target. Leaves the generator as it
        was, so that the call that trains draws what this one drew."""
        needed, rows = visits.teacher_rows, self.evaluated(visits)
        if not rows and not self.lockstep:
            return state
        device = state.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if not rows:
                f(Coefficients(*visits.coefficients[:, :1]), slice(1))
            elif rows == len(needed):
                state = state.index_copy(0, needed, f(Coefficients(*visits.teacher_coefficients), needed))
            else:
                at = visits.coefficients.index_copy(1, needed, visits.teacher_coefficients)
                state = state.index_copy(0, needed, f(Coefficients(*at), _ALL)[needed])
        if torch.is_autocast_enabled(device.type):
            # Torch before 2.11 keeps the weights' casts that were made without gradient for the call that trains.
            torch.clear_autocast_cache()
        return state


EVERY_ROW = Teacher()


def visit_loss(
    network: nn.Module,
    x0: torch.Tensor,
    state: torch.Tensor,
    visits: Visits,
    labels: torch.Tensor | None = None,
    teacher: Teacher = EVERY_ROW,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry out a plan: the loss of each sample [B], and the next x0-state [B, C, H, W] (detached).

    `x0` [B, C, H, W] are the images, `state` their x0-states, `labels` [B] int64. The target is x_0 and, with the rest
    of its weight (Eq. 3), the x0-state or the network's estimate at the level below.
    """
    shape = tuple(x0.shape[1:])
    eps = rng.normal(visits.noise_key, shape)
    condition = None
    if visits.condition == "noise":
        condition = rng.normal(visits.condition_key, shape)
    elif visits.condition == "state":
        condition = state

    def f(at: Coefficients, rows: slice | torch.Tensor) -> torch.Tensor:
        xt = add_noise(x0[rows], eps[rows], at)
        return denoise(network, xt, at, _rows(condition, rows), _rows(labels, rows))

    target = teacher.target(f, state, visits)
    output = f(Coefficients(*visits.coefficients), _ALL)
    loss = visits.weight * adaptive_loss(output, x0, target, visits.x0_weight, visits.huber_c)
    return loss, output.detach()


def _rows(tensor: torch.Tensor | None, rows: slice | torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]
