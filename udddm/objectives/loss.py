"""The loss of a visit, common to all objectives, with Eq. 3 and Eq. 4 of the paper (arXiv 2405.21059)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from udddm import rng
from udddm.diffusion.denoise import add_noise, append_dims, denoise
from udddm.diffusion.schedule import Coefficients
from udddm.objectives.base import Visits

Estimate = Callable[[Coefficients, slice | torch.Tensor], torch.Tensor]
_ALL = slice(None)


def pseudo_huber(x: torch.Tensor, y: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """Eq. 4: d(x, y) = sqrt(||x - y||^2 + c^2) - c, with one norm per image. x and y are [B, C, H, W]; returns [B].

    `c` is a number or [B]. Computed as ||x - y||^2 / (sqrt(||x - y||^2 + c^2) + c), which avoids cancellation for a
    large c.
    """
    square = (x - y).square().flatten(1).sum(1)
    return square / ((square + c * c).sqrt() + c)


def adaptive_loss(
    output: torch.Tensor, x0: torch.Tensor, state: torch.Tensor, x0_weight: torch.Tensor, c: float | torch.Tensor
) -> torch.Tensor:
    """Eq. 3 with x0_weight [B] = 1/(n+1): x0_weight * d(f, x0) + (1 - x0_weight) * d(f, state).

    `output` (f), `x0` and `state` are [B, C, H, W]; returns [B].
    """
    return x0_weight * pseudo_huber(output, x0, c) + (1 - x0_weight) * pseudo_huber(output, state, c)


@dataclass(frozen=True)
class Teacher:
    """How the network is called for targets, before the call that trains it.

    With dropout, both calls drop the same units of a row (Song & Dhariwal 2023, section 3.2; Geng et al. 2024), because
    both start with the same state of the generator. The random numbers of a row depend on the shape of the batch, so
    both calls need all rows. So does a compiled network, which would otherwise be compiled for every number of rows.
    """

    every_row: bool = True
    """Evaluate all rows if any row needs it. Otherwise evaluate only the rows that need it."""
    lockstep: bool = False
    """Call the network in every step, even if no target needs it. Required if calls exchange weights between ranks
    (ZeRO 3), because all ranks must then make the same calls."""

    def evaluated(self, visits: Visits) -> int:
        """The number of rows that the network evaluates for the targets of `visits`, those for guidance included."""
        return self._taught(visits) + (0 if visits.guidance is None else len(visits.x0_weight))

    def _taught(self, visits: Visits) -> int:
        needed = len(visits.teacher_rows)
        return len(visits.x0_weight) if self.every_row and needed else needed

    @torch.no_grad()
    def target(self, f: Estimate, state: torch.Tensor, visits: Visits) -> torch.Tensor:
        """The targets [B, C, H, W]: x0-states, and f at the level below in rows without a stored target.

        The state of the generator is restored, so that the call that trains draws the same random numbers.
        """
        needed, rows = visits.teacher_rows, self._taught(visits)
        if not rows and not self.lockstep:
            return state
        device = state.device
        with _same_random_numbers(device):
            if not rows:
                f(Coefficients(*visits.coefficients[:, :1]), slice(1))
            elif rows == len(needed):
                state = state.index_copy(0, needed, f(Coefficients(*visits.teacher_coefficients), needed))
            else:
                at = visits.coefficients.index_copy(1, needed, visits.teacher_coefficients)
                state = state.index_copy(0, needed, f(Coefficients(*at), _ALL)[needed])
        return state


EVERY_ROW = Teacher()


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """For calls of the network before the one that trains: that one then draws the same random numbers."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        yield
    if torch.is_autocast_enabled(device.type):
        # PyTorch before 2.11 would reuse weights that were cast here, without gradient, in the call that trains.
        torch.clear_autocast_cache()


def visit_loss(
    network: nn.Module,
    x0: torch.Tensor,
    state: torch.Tensor,
    visits: Visits,
    labels: torch.Tensor | None = None,
    teacher: Teacher = EVERY_ROW,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry out a plan. Returns the loss of each sample [B] and the next x0-states [B, C, H, W] (detached).

    `x0` [B, C, H, W] are the images, `state` [B, C, H, W] their x0-states, and `labels` [B] int64 their classes. The
    target is x_0 and, with the remaining weight (Eq. 3), the x0-state or the network's estimate at the level below. In
    refined visits, an estimate takes the place of x_0 everywhere, or that of the conditioning image. With guidance that
    is trained in (guided.py), x_0 as the target and the image of the level below move away from the estimate without a
    label.
    """
    shape = tuple(x0.shape[1:])
    eps = rng.normal(visits.noise_key, shape)
    condition = None
    if visits.condition == "noise":
        condition = rng.normal(visits.condition_key, shape)
    elif visits.condition == "state":
        condition = state
    elif visits.condition == "data":
        condition = visits.condition_images

    def estimates(images: torch.Tensor, labels: torch.Tensor | None = labels) -> Estimate:
        def f(at: Coefficients, rows: slice | torch.Tensor) -> torch.Tensor:
            xt = add_noise(images[rows], eps[rows], at)
            return denoise(network, xt, at, _rows(condition, rows), _rows(labels, rows))

        return f

    at = Coefficients(*visits.coefficients)
    guidance = visits.guidance
    if (refined := visits.refined) is not None:
        estimate = state
        if refined.source == "network":
            with _same_random_numbers(state.device):
                estimate = estimates(x0)(at, _ALL)
        used = refined.used(x0, estimate)
        x0, condition = refined.inputs(used, x0, condition, estimate)
        if guidance is not None:  # an estimate is guided already
            guidance = guidance.masked_fill(used, 0.0)
    aim, below = x0, x0
    if guidance is not None:
        assert labels is not None
        with _same_random_numbers(state.device):
            mean = estimates(x0, torch.full_like(labels, visits.no_label))(at, _ALL)
        aim, below = (x0 + append_dims(factor) * (x0 - mean) for factor in guidance)
    target = teacher.target(estimates(below), state, visits)
    output = estimates(x0)(at, _ALL)
    loss = visits.weight * adaptive_loss(output, aim, target, visits.x0_weight, visits.huber_c)
    return loss, output.detach()


def _rows(tensor: torch.Tensor | None, rows: slice | torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]
