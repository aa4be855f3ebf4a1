"""Improved consistency training, iCT (Song & Dhariwal 2023, arXiv 2310.14189), without a store.

The network is evaluated twice at every visit: once without gradient for the target, and once for the loss.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

import numpy as np

from udddm import rng
from udddm.config import ICTConfig, RefinedConfig
from udddm.diffusion.schedule import SIGMA_HIGHEST, NoiseSchedule
from udddm.objectives import special
from udddm.objectives.base import Ids, ObjectiveContext, Visits
from udddm.objectives.pairs import RefinedPairs
from udddm.objectives.target import TargetObjective
from udddm.rng import Stream

HUBER_C = 0.00054
"""c of Eq. 4 divided by sqrt(C H W) (Song & Dhariwal 2023, section 3.3)."""


class ICT(TargetObjective):
    """A curriculum of levels k = 1..N over a run of `epochs` epochs. The target of level k is the estimate at k - 1.

    N starts at `s0` and doubles after equal fractions of the run, up to `s1` (iCT, Eq. 11). k is drawn lognormally in
    sigma (Eq. 10) or uniformly. The weight is 1 / (sigma_k - sigma_(k-1)), or 1 with `weighting: none`. At the lowest
    level, the image is its own estimate.
    """

    refines = True
    guides = True

    def __init__(
        self,
        schedule: NoiseSchedule,
        config: ICTConfig,
        huber_c: float,
        seed: int,
        epochs: float,
        conditioned: bool,
        refined: RefinedConfig | None = None,
    ):
        super().__init__(schedule, huber_c, seed, conditioned)
        self.config, self.epochs = config, epochs
        refined = refined or RefinedConfig()
        stages = range(1, math.ceil(epochs)) if refined.share else ()
        changes = (epoch for epoch in stages if self.levels(epoch) != self.levels(epoch - 1))
        self.refined = RefinedPairs(refined, seed, epochs, changes)
        self.reads_state = self.refined.read_state

    @classmethod
    def create(cls, context: ObjectiveContext) -> Self:
        """The objective of a run."""
        c = context.huber_c(HUBER_C * math.sqrt(context.pixels))
        config, seed = context.config, context.seed
        return cls(context.schedule, config.ict, c, seed, context.epochs, context.conditioned, config.refined)

    def levels(self, epoch: int) -> int:
        """The number of levels N in `epoch`."""
        c = self.config
        shares = int(math.log2(c.s1 / c.s0)) + 1
        doublings = int(shares * epoch / max(self.epochs, 1))
        return min(c.s0 << doublings, c.s1)

    def phase(self, epoch: int) -> str:
        return f"iCT with {self.levels(epoch)} noise levels"

    def plan(self, ids: Ids, epoch: int) -> Visits:
        count = self.levels(epoch)
        times = self.schedule.levels(count)
        sigma = np.minimum(self.schedule.sigma(times), SIGMA_HIGHEST)
        if self.config.distribution == "lognormal":
            cumulated = special.ndtr((np.log(sigma) - self.config.p_mean) / self.config.p_std)
            shares = (cumulated[1:] - cumulated[0]) / (cumulated[-1] - cumulated[0])
        else:
            shares = np.arange(1, count + 1) / count
        drawn = self.refined.drawn(ids, epoch)
        u = rng.uniform(rng.keys(self.seed, Stream.TIME, ids, drawn))
        level = 1 + np.searchsorted(shares[:-1], u, side="right")
        weight = np.ones(len(ids)) if self.config.weighting == "none" else 1 / np.diff(sigma, prepend=0.0)[level]
        teacher_rows = np.flatnonzero(level > 1)
        noise, refined = self.refined.plan(ids, epoch, drawn, sigma[level])
        visits = self.visits(
            ids,
            epoch,
            times[level],
            rng.keys(self.seed, Stream.NOISE, ids, noise),
            x0_weight=(level == 1).astype(np.float64),  # f at the lowest level is x_0 to within sigma_min
            weight=weight,
            teacher_rows=teacher_rows,
            teacher_times=times[level[teacher_rows] - 1],
        )
        return replace(visits, refined=refined)
