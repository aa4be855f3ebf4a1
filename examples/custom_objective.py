"""Consistency training with a fixed number of noise levels (Song et al. 2023, arXiv 2303.01469), in one file.

    PYTHONPATH=examples udddm-train --config digits \\
        --set objective.name=custom_objective:PlainConsistency --set 'objective.settings={levels: 18}'

An objective plans each visit as a pure function of (seed, sample, epoch): its noise level, its target and its loss
weight. No other code is needed: `udddm.objectives.visit_loss` executes any plan.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field

from udddm import rng
from udddm.config import Section
from udddm.objectives import ObjectiveContext, Visits
from udddm.objectives.base import Ids
from udddm.objectives.target import TargetObjective
from udddm.rng import Stream


class PlainConsistency(TargetObjective):
    """Consistency training on a fixed grid of noise levels."""

    class Settings(Section):
        """The section `objective.settings`."""

        levels: int = Field(18, ge=1)
        """Number of noise levels above the lowest."""
        weighting: Literal["none", "gap"] = "gap"
        """Loss weight of a level: 1, or 1 / (sigma_k - sigma_(k-1))."""
        huber_c: float = Field(0.03, gt=0)
        """c of the pseudo-Huber loss (Eq. 4)."""

    def __init__(self, context: ObjectiveContext, settings: Settings):
        super().__init__(context.schedule, settings.huber_c, context.seed, context.conditioned)
        self.settings = settings
        self.times = context.schedule.levels(settings.levels)
        self.gaps = np.diff(context.schedule.sigma(self.times))

    @classmethod
    def create(cls, context: ObjectiveContext, settings: Settings) -> Self:
        return cls(context, settings)

    def plan(self, ids: Ids, epoch: int) -> Visits:
        # Every random number is a function of its position, so a visit draws the same level in any process.
        level = 1 + rng.randint(self.settings.levels, rng.keys(self.seed, Stream.TIME, ids, epoch))
        taught = np.flatnonzero(level > 1)
        return self.visits(
            ids,
            epoch,
            self.times[level],
            rng.keys(self.seed, Stream.NOISE, ids, epoch),
            x0_weight=(level == 1).astype(np.float64),  # the target of the lowest level is the image
            weight=1 / self.gaps[level - 1] if self.settings.weighting == "gap" else np.ones(len(ids)),
            teacher_rows=taught,  # the others: the network's output one level below, same noise
            teacher_times=self.times[level[taught] - 1],
        )
