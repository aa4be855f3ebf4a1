"""The EDM denoiser (Karras et al. 2022): sampled with many evaluations, and the pretraining of other objectives."""

from __future__ import annotations

import math
from typing import Self

import numpy as np

from udddm import rng
from udddm.config import EDMConfig
from udddm.diffusion.schedule import NoiseSchedule
from udddm.objectives.base import Ids, ObjectiveContext, Visits
from udddm.objectives.target import TargetObjective, lognormal
from udddm.rng import Stream

SQUARED = 1e4
"""c of Eq. 4 divided by sqrt(C H W), far above every distance: Eq. 4 is then ||x - y||^2 / (2 c)."""
_NONE = np.empty(0, np.int64)


class EDM(TargetObjective):
    """ln sigma ~ N(p_mean, p_std^2), and the loss is lambda(sigma) ||f - x_0||^2 / (C H W) with lambda = 1/c_out^2.

    If c is far above every distance, Eq. 4 is ||.||^2 / (2 c). With such a c, this loss is Eq. 3 with x_0 as target.
    """

    is_denoiser = True
    guides = True
    reads_state = False

    def __init__(
        self,
        schedule: NoiseSchedule,
        config: EDMConfig,
        seed: int,
        pixels: int,
        conditioned: bool,
    ):
        super().__init__(schedule, SQUARED * math.sqrt(pixels), seed, conditioned)
        self.config, self.pixels = config, pixels

    @classmethod
    def create(cls, context: ObjectiveContext) -> Self:
        """The objective of a run."""
        return cls(context.schedule, context.config.edm, context.seed, context.pixels, context.conditioned)

    def phase(self, epoch: int) -> str:
        return "a denoiser (EDM)"

    def plan(self, ids: Ids, epoch: int) -> Visits:
        sigma = lognormal(
            self.schedule, rng.keys(self.seed, Stream.TIME, ids, epoch), self.config.p_mean, self.config.p_std
        )
        data = self.schedule.config.sigma_data
        edm = (sigma**2 + data**2) / (sigma * data) ** 2
        return self.visits(
            ids,
            epoch,
            self.schedule.time(sigma),
            rng.keys(self.seed, Stream.NOISE, ids, epoch, 1),
            x0_weight=np.ones(len(ids)),
            weight=edm * 2 * self.huber_c / self.pixels,
            teacher_rows=_NONE,
            teacher_times=np.empty(0),
        )
