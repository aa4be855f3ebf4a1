"""What chains, consistency training and denoisers have in common: a loss towards x_0 or an estimate at a lower level.

They differ in their plan alone: which level a visit trains, how much of its target is x_0 (`guide`), whether the rest
is the stored x0-state or an estimate made on the spot (`fresh`), and how the loss is weighed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm import rng
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients, NoiseSchedule
from udddm.objectives.base import Visits
from udddm.objectives.loss import adaptive_loss
from udddm.rng import Stream

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Estimate = Callable[[Coefficients, slice | torch.Tensor], torch.Tensor]
_ALL = slice(None)


@dataclass(frozen=True)
class Teacher:
    """How the network is called for targets, before the call that trains it.

    With dropout both calls drop the same units of a row (Song & Dhariwal 2023, section 3.2; Geng et al. 2024): the
    generator starts both in the same state. A row's place in its sequence depends on the shape of the batch, so that
    both calls need all rows. A compiled network needs them too, or it would be compiled for each number of rows.
    """

    every_row: bool = True
    """Evaluate all rows wherever one needs it. Otherwise those that do."""
    lockstep: bool = False
    """Call the network in every step, needed or not: where calls exchange weights between ranks (ZeRO 3), all must
    make the same ones."""

    def rows(self, fresh: int, batch: int) -> int:
        """How many rows of a batch are evaluated if `fresh` of them need it."""
        return batch if fresh and self.every_row else fresh


EVERY_ROW = Teacher()


class TargetObjective(ABC):
    """`conditioned` says whether the network takes an image. That image is fresh noise, as in the first step of
    Algorithm 2: were it the state, the network would copy its target."""

    def __init__(
        self, process: NoiseSchedule, huber_c: float, seed: int, conditioned: bool, teacher: Teacher = EVERY_ROW
    ):
        self.process, self.huber_c, self.seed = process, huber_c, seed
        self.conditioned, self.teacher = conditioned, teacher

    def evaluated(self, visits: Visits) -> int:
        return self.teacher.rows(len(visits.teacher_rows), len(visits.x0_weight))

    @abstractmethod
    def plan(self, ids: Ids, epoch: int) -> Visits: ...

    def visits(
        self,
        ids: Ids,
        epoch: int,
        times: Floats,
        noise_key: rng.Keys,
        guide: Floats,
        weight: Floats,
        fresh: Ids,
        fresh_times: Floats,
    ) -> Visits:
        return Visits(
            coefficients=torch.from_numpy(self.process.coefficients(times)),
            noise_key=rng.as_tensor(noise_key),
            condition_key=rng.as_tensor(rng.keys(self.seed, Stream.CONDITION, ids, epoch)),
            x0_weight=torch.from_numpy(guide.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            huber_c=torch.full((len(ids),), self.huber_c),
            teacher_rows=torch.from_numpy(fresh),
            teacher_coefficients=torch.from_numpy(self.process.coefficients(fresh_times)),
        )

    def __call__(
        self,
        network: nn.Module,
        x0: torch.Tensor,
        state: torch.Tensor,
        visits: Visits,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = tuple(x0.shape[1:])
        eps = rng.normal(visits.noise_key, shape)
        condition = rng.normal(visits.condition_key, shape) if self.conditioned else None

        def f(at: Coefficients, rows: slice | torch.Tensor) -> torch.Tensor:
            xt = add_noise(x0[rows], eps[rows], at)
            return denoise(network, xt, at, _rows(condition, rows), _rows(labels, rows))

        target = self._target(f, state, visits)
        output = f(Coefficients(*visits.coefficients), _ALL)
        return visits.weight * adaptive_loss(output, x0, target, visits.x0_weight, visits.huber_c), output.detach()

    @torch.no_grad()
    def _target(self, f: Estimate, state: torch.Tensor, visits: Visits) -> torch.Tensor:
        """The x0-states, with f at the level below in the rows that are fresh. Leaves the generator as it was, so that
        the call that trains draws what this one drew."""
        fresh, rows = visits.teacher_rows, self.evaluated(visits)
        if not rows and not self.teacher.lockstep:
            return state
        device = state.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if not rows:
                f(Coefficients(*visits.coefficients[:, :1]), slice(1))
            elif rows == len(fresh):
                state = state.index_copy(0, fresh, f(Coefficients(*visits.teacher_coefficients), fresh))
            else:
                at = visits.coefficients.index_copy(1, fresh, visits.teacher_coefficients)
                state = state.index_copy(0, fresh, f(Coefficients(*at), _ALL)[fresh])
        if torch.is_autocast_enabled(device.type):
            # Torch before 2.11 keeps the weights' casts that were made without gradient for the call that trains.
            torch.clear_autocast_cache()
        return state


def _rows(tensor: torch.Tensor | None, rows: slice | torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]
