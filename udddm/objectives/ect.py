"""Easy Consistency Tuning, ECT (Geng et al. 2024, arXiv 2406.14548), with evaluated or stored targets.

The first phase of ECT, which trains a denoiser, is `objective.pretrain`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

import numpy as np
import numpy.typing as npt

from udddm import rng
from udddm.config import ECTConfig, RefinedConfig
from udddm.diffusion.schedule import NoiseSchedule
from udddm.errors import ConfigError
from udddm.objectives import special
from udddm.objectives.base import Ids, ObjectiveContext, Visits
from udddm.objectives.ict import HUBER_C
from udddm.objectives.pairs import RefinedPairs
from udddm.objectives.target import Floats, TargetObjective, lognormal
from udddm.rng import Stream


class ECT(TargetObjective):
    """ECT: sigma is lognormal, and its teacher is at r = sigma (1 - n(sigma) / q^a) with n = 1 + k sigmoid(-b sigma).

    a = 1, 2, ..., `stages` over equal fractions of a run of `epochs` epochs, so that the gap shrinks. If r is below the
    lowest level, the target is x_0. The weight is 1 / (sigma - r). With `weighting: snr` it is that of EDM's denoisers,
    as in the authors' code for EDM2's models of ImageNet-64 (github.com/locuslab/ect at 2870411).

    With `length` L above 1, visits form chains, as in `Chain`: a sample keeps its noise for L visits. Each visit after
    the first is at the sigma whose r is the sigma of the previous visit, so its target is the x0-state stored there.
    """

    default_pretrain = 0.4
    refines = True
    guides = True

    def __init__(
        self,
        schedule: NoiseSchedule,
        config: ECTConfig,
        huber_c: float,
        seed: int,
        epochs: float,
        conditioned: bool,
        refined: RefinedConfig | None = None,
    ):
        super().__init__(schedule, huber_c, seed, conditioned)
        self.config = config
        self._starts = [math.ceil(stage * epochs / config.stages) for stage in range(config.stages)]
        self.refined = RefinedPairs(refined or RefinedConfig(), seed, epochs, self._starts)
        self.reads_state = config.length > 1 or self.refined.read_state

    @classmethod
    def create(cls, context: ObjectiveContext) -> Self:
        """The objective of a run. Raises ConfigError for refined pairs together with stored targets."""
        c = context.huber_c(HUBER_C * math.sqrt(context.pixels))
        config, seed = context.config, context.seed
        if config.refined.share and config.ect.length > 1:
            raise ConfigError(
                "the x0-state cannot be both the image of the next visit (objective.refined.share above 0) and its "
                "target (objective.ect.length above 1): set one of them to its default"
            )
        return cls(context.schedule, config.ect, c, seed, context.epochs, context.conditioned, config.refined)

    def below(self, sigma: Floats, stage: int) -> Floats:
        """r of `sigma` [B]. The result may be negative."""
        c = self.config
        near = 1 + c.k * special.expit(-c.b * sigma)
        found: Floats = sigma * (1 - near / c.q ** (stage + 1))
        return found

    def weight(self, sigma: Floats, r: Floats) -> Floats:
        """The weight of the loss of visits at `sigma` [B] whose teacher is at `r` [B]."""
        if self.config.weighting == "gap":
            return 1 / (sigma - r)
        return 1 / sigma**2 + 1 / self.schedule.config.sigma_data**2

    def above(self, r: Floats, stage: int) -> Floats:
        """The sigma whose r is `r` [B] > 0, by bisection, because `below` increases wherever it is positive."""
        low, high = r.copy(), r * 2
        while (self.below(high, stage) < r).any():
            high *= 2
        for _ in range(50):
            middle = (low + high) / 2
            under = self.below(middle, stage) < r
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        return high

    def visit(
        self, ids: Ids, epoch: int, drawn: Ids | None = None
    ) -> tuple[Floats, Floats, npt.NDArray[np.bool_], rng.Keys]:
        """(sigma, r, whether the target at r is stored, key of the noise) of each visit, each [B]. r = 0 means x_0.

        `drawn` [B] is the epoch in which each was drawn, if not `epoch`.
        """
        c = self.config
        stage = self._stage(epoch)
        since = (epoch if drawn is None else drawn) - self._starts[stage]
        chain, visit = np.divmod(since + rng.randint(c.length, self._key(Stream.CHAIN_OFFSET, ids, stage)), c.length)
        visit = np.where(chain == 0, since, visit)
        sigma = lognormal(self.schedule, self._key(Stream.CHAIN_LEVEL, ids, stage, chain), c.p_mean, c.p_std)
        stored = visit > 0
        for step in range(1, int(visit.max(initial=0)) + 1):
            sigma = np.where(visit >= step, self.above(sigma, stage), sigma)
        beyond = sigma > self.schedule.highest  # beyond the highest level the chain ends, and its visit is independent
        fresh = lognormal(self.schedule, self._key(Stream.TIME, ids, epoch), c.p_mean, c.p_std)
        sigma, stored = np.where(beyond, fresh, sigma), stored & ~beyond
        r = self.below(sigma, stage)
        return sigma, np.where(r < self.schedule.lowest, 0.0, r), stored, self._key(Stream.NOISE, ids, stage, chain)

    def _stage(self, epoch: int) -> int:
        return max(j for j, start in enumerate(self._starts) if start <= epoch)

    def _key(self, stream: Stream, *parts: rng.Integers) -> rng.Keys:
        return rng.keys(self.seed, stream, *parts)

    def phase(self, epoch: int) -> str:
        return f"ECT, stage {self._stage(epoch) + 1} of {self.config.stages}"

    def plan(self, ids: Ids, epoch: int) -> Visits:
        drawn = self.refined.drawn(ids, epoch)
        sigma, r, stored, noise_key = self.visit(ids, epoch, drawn)
        noise, refined = self.refined.plan(ids, epoch, drawn, sigma)
        if refined is not None:
            stage = self._stage(epoch)
            noise_key = self._key(Stream.NOISE, ids, stage, noise - self._starts[stage])
        teacher_rows = np.flatnonzero((r > 0) & ~stored)
        visits = self.visits(
            ids,
            epoch,
            self.schedule.time(sigma),
            noise_key,
            x0_weight=((r == 0) & ~stored).astype(np.float64),
            weight=self.weight(sigma, r),
            teacher_rows=teacher_rows,
            teacher_times=self.schedule.time(r[teacher_rows]),
        )
        visits = replace(visits, refined=refined)
        if self.config.length == 1:
            return visits
        rows = np.flatnonzero(stored & (r > 0))
        return self.with_stored(visits, rows, self.schedule.time(r[rows]))
