"""What chains, consistency training and denoisers have in common: a loss towards x_0 or an estimate at a lower level.

They differ in their plan alone: which level a visit trains, how much of its target is x_0 (`guide`), whether the rest
is the stored x0-state or an estimate made on the spot (`fresh`), and how the loss is weighed.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm import noise
from udddm.noise import Stream
from udddm.objective.loss import Visits, adaptive_loss, add_noise, denoise
from udddm.process import Coefficients, Process

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Matching(ABC):
    """`conditioned` says whether the network takes an image. That image is fresh noise, as in the first step of
    Algorithm 2: were it the state, the network would copy its target. With `lockstep` the network is called twice in
    every step, needed or not: where calls exchange weights between ranks (ZeRO 3), all must make the same ones. With
    `same_dropout` both calls drop the same units (Song & Dhariwal 2023, section 3.2)."""

    def __init__(
        self,
        process: Process,
        huber_c: float,
        seed: int,
        conditioned: bool,
        lockstep: bool = False,
        same_dropout: bool = False,
    ):
        self.process, self.huber_c, self.seed = process, huber_c, seed
        self.conditioned, self.lockstep, self.same_dropout = conditioned, lockstep, same_dropout

    @abstractmethod
    def plan(self, ids: Ids, epoch: int) -> Visits: ...

    def visits(
        self,
        ids: Ids,
        epoch: int,
        times: Floats,
        noise_key: noise.Keys,
        guide: Floats,
        weight: Floats,
        fresh: Ids,
        fresh_times: Floats,
    ) -> Visits:
        return Visits(
            coefficients=torch.from_numpy(self.process.coefficients(times)),
            noise_key=noise.as_tensor(noise_key),
            condition_key=noise.as_tensor(noise.keys(self.seed, Stream.CONDITION, ids, epoch)),
            guide=torch.from_numpy(guide.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            huber_c=torch.full((len(ids),), self.huber_c),
            fresh=torch.from_numpy(fresh),
            fresh_coefficients=torch.from_numpy(self.process.coefficients(fresh_times)),
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
        eps = noise.normal(visits.noise_key, shape)
        condition = noise.normal(visits.condition_key, shape) if self.conditioned else None

        def estimate(rows: torch.Tensor, at: Coefficients) -> torch.Tensor:
            with torch.no_grad(), self._teacher_dropout(x0.device):
                xt = add_noise(x0[rows], eps[rows], at)
                return denoise(network, xt, at, _rows(condition, rows), _rows(labels, rows))

        target = state
        if len(visits.fresh):
            target = state.index_copy(0, visits.fresh, estimate(visits.fresh, Coefficients(*visits.fresh_coefficients)))
        elif self.lockstep:
            estimate(torch.zeros(1, dtype=torch.int64, device=x0.device), Coefficients(*visits.coefficients[:, :1]))
        at = Coefficients(*visits.coefficients)
        output = denoise(network, add_noise(x0, eps, at), at, condition, labels)
        return visits.weight * adaptive_loss(output, x0, target, visits.guide, visits.huber_c), output.detach()

    def _teacher_dropout(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Leave the generator where the trained pass begins, so that it draws what this one drew."""
        if not self.same_dropout:
            return contextlib.nullcontext()
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _rows(tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]
