"""The EDM denoiser (Karras et al. 2022): what a network can do with many evaluations; a warm-up for the others."""

from __future__ import annotations

import math

import numpy as np

from udddm import rng
from udddm.config import EDMConfig
from udddm.diffusion.schedule import NoiseSchedule
from udddm.objectives.base import Visits
from udddm.objectives.ict import lognormal
from udddm.objectives.target import EVERY_ROW, Ids, TargetObjective, Teacher
from udddm.rng import Stream

_NONE = np.empty(0, np.int64)


class EDM(TargetObjective):
    """ln sigma ~ N(mean, deviation^2) and the loss lambda(sigma) ||f - x_0||^2 / (C H W), lambda = 1/c_out^2.

    Eq. 4 is ||.||^2 / (2 c) where c is far above every distance; with such a c this is Eq. 3 with x_0 for a target.
    """

    def __init__(
        self,
        process: NoiseSchedule,
        config: EDMConfig,
        seed: int,
        pixels: int,
        conditioned: bool,
        teacher: Teacher = EVERY_ROW,
    ):
        super().__init__(process, 1e4 * math.sqrt(pixels), seed, conditioned, teacher)
        self.config, self.pixels = config, pixels

    def plan(self, ids: Ids, epoch: int) -> Visits:
        sigma = lognormal(
            self.process, rng.keys(self.seed, Stream.TIME, ids, epoch), self.config.p_mean, self.config.p_std
        )
        data = self.process.config.sigma_data
        edm = (sigma**2 + data**2) / (sigma * data) ** 2
        return self.visits(
            ids,
            epoch,
            self.process.time(sigma),
            rng.keys(self.seed, Stream.NOISE, ids, epoch, 1),
            guide=np.ones(len(ids)),
            weight=edm * 2 * self.huber_c / self.pixels,
            fresh=_NONE,
            fresh_times=np.empty(0),
        )
