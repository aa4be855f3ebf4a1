"""The EDM denoiser (Karras et al. 2022): what a network can do with many evaluations; a warm-up for the others."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from udddm import noise
from udddm.config import DenoiserConfig
from udddm.noise import Stream
from udddm.objective.consistency import lognormal
from udddm.objective.loss import Objective, Visits
from udddm.objective.matching import EVERY_ROW, Ids, Matching, Teacher
from udddm.process import Process

_NONE = np.empty(0, np.int64)


class Denoiser(Matching):
    """ln sigma ~ N(mean, deviation^2) and the loss lambda(sigma) ||f - x_0||^2 / (C H W), lambda = 1/c_out^2.

    Eq. 4 is ||.||^2 / (2 c) where c is far above every distance; with such a c this is Eq. 3 with x_0 for a target.
    """

    def __init__(
        self,
        process: Process,
        config: DenoiserConfig,
        seed: int,
        pixels: int,
        conditioned: bool,
        teacher: Teacher = EVERY_ROW,
    ):
        super().__init__(process, 1e4 * math.sqrt(pixels), seed, conditioned, teacher)
        self.config, self.pixels = config, pixels

    def plan(self, ids: Ids, epoch: int) -> Visits:
        sigma = lognormal(
            self.process, noise.keys(self.seed, Stream.TIME, ids, epoch), self.config.mean, self.config.deviation
        )
        data = self.process.config.sigma_data
        edm = (sigma**2 + data**2) / (sigma * data) ** 2
        return self.visits(
            ids,
            epoch,
            self.process.time(sigma),
            noise.keys(self.seed, Stream.NOISE, ids, epoch, 1),
            guide=np.ones(len(ids)),
            weight=edm * 2 * self.huber_c / self.pixels,
            fresh=_NONE,
            fresh_times=np.empty(0),
        )


class WarmedUp:
    """`first` for `epochs` epochs, then `then`, which counts its own from there."""

    def __init__(self, first: Denoiser, then: Objective, epochs: int):
        self.first, self.then, self.epochs = first, then, epochs

    def plan(self, ids: Ids, epoch: int) -> Visits:
        if epoch < self.epochs:
            return self.first.plan(ids, epoch)
        return self.then.plan(ids, epoch - self.epochs)

    def evaluated(self, visits: Visits) -> int:
        return self.then.evaluated(visits)  # of a denoiser's visits none is fresh

    def __call__(
        self,
        network: nn.Module,
        x0: torch.Tensor,
        state: torch.Tensor,
        visits: Visits,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.then(network, x0, state, visits, labels)
