"""Consistency training without a store, to compare with: iCT, and Easy Consistency Tuning.

Both evaluate the network twice at every visit, the teacher without gradient. iCT: Song & Dhariwal 2023 (arXiv
2310.14189). ECT: Geng et al. 2024 (arXiv 2406.14548); its first phase, a denoiser, is `objective.pretrain`.
"""

from __future__ import annotations

import math

import numpy as np

from udddm import rng
from udddm.config import ICTConfig
from udddm.diffusion.schedule import SIGMA_HIGHEST, NoiseSchedule
from udddm.objectives import special
from udddm.objectives.base import Visits
from udddm.objectives.target import EVERY_ROW, Floats, Ids, TargetObjective, Teacher
from udddm.rng import Stream


class ICT(TargetObjective):
    """Levels k = 1..N by a curriculum over a run of `epochs` epochs; level k learns what the network says at k - 1.

    N begins at `first` and doubles up to `last`, after equal shares of the run (iCT, Eq. 11). k is lognormal in sigma
    (Eq. 10) or uniform, the weight 1 / (sigma_k - sigma_(k-1)). At the lowest level an image is its own estimate.
    """

    def __init__(
        self,
        process: NoiseSchedule,
        config: ICTConfig,
        huber_c: float,
        seed: int,
        epochs: float,
        conditioned: bool,
        teacher: Teacher = EVERY_ROW,
    ):
        super().__init__(process, huber_c, seed, conditioned, teacher)
        self.config, self.epochs = config, epochs

    def levels(self, epoch: int) -> int:
        """N in `epoch`."""
        c = self.config
        shares = int(math.log2(c.s1 / c.s0)) + 1
        doublings = int(shares * epoch / max(self.epochs, 1))
        return min(c.s0 << doublings, c.s1)

    def plan(self, ids: Ids, epoch: int) -> Visits:
        count = self.levels(epoch)
        times = self.process.levels(count)
        sigma = np.minimum(self.process.sigma(times), SIGMA_HIGHEST)
        if self.config.distribution == "lognormal":
            cumulated = special.ndtr((np.log(sigma) - self.config.p_mean) / self.config.p_std)
            shares = (cumulated[1:] - cumulated[0]) / (cumulated[-1] - cumulated[0])
        else:
            shares = np.arange(1, count + 1) / count
        u = rng.uniform(rng.keys(self.seed, Stream.TIME, ids, epoch))
        level = 1 + np.searchsorted(shares[:-1], u, side="right")
        weight = np.ones(len(ids)) if self.config.weighting == "none" else 1 / np.diff(sigma, prepend=0.0)[level]
        fresh = np.flatnonzero(level > 1)
        return self.visits(
            ids,
            epoch,
            times[level],
            rng.keys(self.seed, Stream.NOISE, ids, epoch),
            guide=(level == 1).astype(np.float64),  # f at the lowest level is x_0 to within sigma_min
            weight=weight,
            fresh=fresh,
            fresh_times=times[level[fresh] - 1],
        )


def lognormal(process: NoiseSchedule, key: rng.Keys, mean: float, deviation: float) -> Floats:
    """sigma [B], one a key, with ln sigma ~ N(mean, deviation^2), clipped to the process's levels."""
    drawn: Floats = np.exp(mean + deviation * special.ndtri(rng.uniform(key)))
    return drawn.clip(process.lowest, process.highest)
