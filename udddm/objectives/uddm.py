"""Algorithm 1 of the paper as printed: a new time and new noise at every visit, conditioned on the stored state.

Provided for measurements and comparisons. The network learns to copy its condition (docs/method.md): use `chain`.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch

from udddm import rng
from udddm.diffusion.schedule import NoiseSchedule
from udddm.errors import ConfigError
from udddm.objectives.base import Ids, Objective, ObjectiveContext, Visits
from udddm.rng import Stream


class UDDM(Objective):
    """t ~ U{1..T} and eps ~ N(0, I) at every visit; n is the epoch, counted from 0."""

    def __init__(self, schedule: NoiseSchedule, huber_c: float, seed: int):
        self.schedule, self.huber_c, self.seed = schedule, huber_c, seed

    @classmethod
    def create(cls, context: ObjectiveContext) -> Self:
        """The objective of a run. Raises ConfigError for a network that takes no conditioning image."""
        if not context.conditioned:
            raise ConfigError(
                "Algorithm 1 conditions the network on the x0-state: set network.condition=cross-attention"
            )
        return cls(context.schedule, context.huber_c(context.schedule.huber_c), context.seed)

    def plan(self, ids: Ids, epoch: int) -> Visits:
        t = 1 + rng.randint(self.schedule.config.timesteps, rng.keys(self.seed, Stream.TIME, ids, epoch))
        return Visits(
            coefficients=torch.from_numpy(self.schedule.coefficients(t.astype(np.float64))),
            noise_key=rng.as_tensor(rng.keys(self.seed, Stream.NOISE, ids, epoch)),
            condition_key=torch.empty(0, dtype=torch.int64),
            x0_weight=torch.full((len(ids),), 1 / (epoch + 1)),
            weight=torch.ones(len(ids)),
            huber_c=torch.full((len(ids),), self.huber_c),
            teacher_rows=torch.empty(0, dtype=torch.int64),
            teacher_coefficients=torch.empty(6, 0),
            condition="state",
        )
