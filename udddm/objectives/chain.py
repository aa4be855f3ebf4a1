"""The chain objective: consistency training whose teacher is the x0-state store (docs/method.md).

A chain uses the same noise for L visits and increases the noise level by one at each visit. The target of level k is f
at level k - 1 on the same noise path: the state stored in the previous visit or, at the first visit of a chain, one
extra evaluation without gradient (consistency training, Song et al. 2023, does this at every step: L = 1). The target
of the lowest level is x_0. Levels are cyclic: after level M a chain continues at level 0, whose target needs no state,
so that all levels are visited equally often for any L. The trajectory objective is L = M + 1, starting at level 0.

With the clock u = epochs since the start of the stage + offset(sample), a chain consists of the visits with equal
u // L. The offset staggers the chains and shortens the first chain of a stage.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np

from udddm import rng
from udddm.config import ChainConfig
from udddm.diffusion.schedule import SIGMA_HIGHEST, NoiseSchedule
from udddm.objectives import special
from udddm.objectives.base import Ids, ObjectiveContext, Visits
from udddm.objectives.target import TargetObjective
from udddm.rng import Stream

HUBER_C = 0.19
"""c of Eq. 4 divided by sqrt(C H W) for chains: the best value on the digits data set (docs/method.md, "c")."""


class Chain(TargetObjective):
    """The chain objective of a run of `epochs` epochs. Stages start at fractions of the run."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        config: ChainConfig,
        huber_c: float,
        seed: int,
        epochs: float,
        conditioned: bool,
    ):
        super().__init__(schedule, huber_c, seed, conditioned)
        self.config = config
        self.reads_state = config.length != 1  # chains of one visit evaluate every target
        self._starts = [math.ceil(stage.start * epochs) for stage in config.stages]
        self._times = [schedule.levels(stage.levels) for stage in config.stages]
        self._sigmas = [np.minimum(schedule.sigma(times), SIGMA_HIGHEST) for times in self._times]

    @classmethod
    def create(cls, context: ObjectiveContext) -> Self:
        """The objective of a run."""
        c = context.huber_c(HUBER_C * math.sqrt(context.pixels))
        return cls(context.schedule, context.config.chain, c, context.seed, context.epochs, context.conditioned)

    def position(self, ids: Ids, epoch: int) -> tuple[int, Ids, Ids, Ids]:
        """(stage, chain number [B], visit within the chain [B], level [B]) of samples `ids` [B] in `epoch`."""
        stage = max(j for j, start in enumerate(self._starts) if start <= epoch)
        levels = self.config.stages[stage].levels
        length = levels + 1 if self.config.length == "trajectory" else self.config.length
        offset = rng.randint(length, rng.keys(self.seed, Stream.CHAIN_OFFSET, ids, stage))
        since = epoch - self._starts[stage]
        chain, visit = np.divmod(since + offset, length)
        visit = np.where(chain == 0, since, visit).astype(np.int64)
        if self.config.length == "trajectory":
            first = np.zeros_like(ids)
        else:
            first = self._first(stage, rng.keys(self.seed, Stream.CHAIN_LEVEL, ids, stage, chain))
        return stage, chain, visit, (first + visit) % (levels + 1)

    def _first(self, stage: int, keys: rng.Keys) -> Ids:
        """The level at which each chain starts, drawn with its key: [B]."""
        if self.config.distribution == "uniform":
            return rng.randint(self.config.stages[stage].levels + 1, keys)
        cumulated = special.ndtr((np.log(self._sigmas[stage]) - self.config.p_mean) / self.config.p_std)
        return np.searchsorted(cumulated[:-1] / cumulated[-1], rng.uniform(keys), side="right")

    def phase(self, epoch: int) -> str:
        stage = max(j for j, start in enumerate(self._starts) if start <= epoch)
        return f"chains on {self.config.stages[stage].levels} noise levels"

    def plan(self, ids: Ids, epoch: int) -> Visits:
        stage, chain, visit, level = self.position(ids, epoch)
        times = self._times[stage]
        lowest = level == 0
        if self.config.x0_weight == "visits":
            x0_weight = 1 / (level + 1.0)
        else:
            x0_weight = lowest.astype(np.float64)
        weight = np.ones(len(ids))
        if self.config.weighting == "gap":
            weight = 1 / np.diff(self._sigmas[stage], prepend=0.0)[level]
        teacher_rows = np.flatnonzero((visit == 0) & ~lowest)
        stored = np.flatnonzero((visit > 0) & ~lowest)
        visits = self.visits(
            ids,
            epoch,
            times[level],
            rng.keys(self.seed, Stream.NOISE, ids, stage, chain),
            x0_weight=x0_weight,
            weight=weight,
            teacher_rows=teacher_rows,
            teacher_times=times[level[teacher_rows] - 1],
        )
        return self.with_stored(visits, stored, times[level[stored] - 1]) if self.reads_state else visits
