"""Consistency training without a store, to compare with: iCT, and Easy Consistency Tuning.

Both evaluate the network twice at every visit, the teacher without gradient. iCT: Song & Dhariwal 2023 (arXiv
2310.14189). ECT: Geng et al. 2024 (arXiv 2406.14548); its first phase, a denoiser, is `objective.warmup`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from udddm import noise
from udddm.config import ConsistencyConfig, TuningConfig
from udddm.noise import Stream
from udddm.objective.loss import Visits
from udddm.objective.matching import Floats, Ids, Matching
from udddm.process import SIGMA_HIGHEST, Process


class Consistency(Matching):
    """Levels k = 1..N by a curriculum over a run of `epochs` epochs; level k learns what the network says at k - 1.

    N begins at `first` and doubles up to `last`, after equal shares of the run (iCT, Eq. 11). k is lognormal in sigma
    (Eq. 10) or uniform, the weight 1 / (sigma_k - sigma_(k-1)). At the lowest level an image is its own estimate.
    """

    def __init__(
        self,
        process: Process,
        config: ConsistencyConfig,
        huber_c: float,
        seed: int,
        epochs: float,
        conditioned: bool,
        lockstep: bool = False,
    ):
        super().__init__(process, huber_c, seed, conditioned, lockstep, same_dropout=True)
        self.config, self.epochs = config, epochs

    def levels(self, epoch: int) -> int:
        """N in `epoch`."""
        c = self.config
        shares = int(math.log2(c.last / c.first)) + 1
        doublings = int(shares * epoch / max(self.epochs, 1))
        return min(c.first << doublings, c.last)

    def plan(self, ids: Ids, epoch: int) -> Visits:
        count = self.levels(epoch)
        times = self.process.levels(count)
        sigma = np.minimum(self.process.sigma(times), SIGMA_HIGHEST)
        if self.config.distribution == "lognormal":
            cumulated = special.ndtr((np.log(sigma) - self.config.mean) / self.config.deviation)
            shares = (cumulated[1:] - cumulated[0]) / (cumulated[-1] - cumulated[0])
        else:
            shares = np.arange(1, count + 1) / count
        u = noise.uniform(noise.keys(self.seed, Stream.TIME, ids, epoch))
        level = 1 + np.searchsorted(shares[:-1], u, side="right")
        weight = np.ones(len(ids)) if self.config.weighting == "none" else 1 / np.diff(sigma, prepend=0.0)[level]
        fresh = np.flatnonzero(level > 1)
        return self.visits(
            ids,
            epoch,
            times[level],
            noise.keys(self.seed, Stream.NOISE, ids, epoch),
            guide=(level == 1).astype(np.float64),  # f at the lowest level is x_0 to within sigma_min
            weight=weight,
            fresh=fresh,
            fresh_times=times[level[fresh] - 1],
        )


class Tuning(Matching):
    """sigma lognormal and its teacher at r = sigma (1 - n(sigma) / q^a), n = 1 + k sigmoid(-b sigma): the gap shrinks.

    a = 1, 2, ..., `stages` over equal shares of a run of `epochs` epochs. Where r is below the lowest level, the target
    is x_0. The weight is 1 / (sigma - r).
    """

    def __init__(
        self,
        process: Process,
        config: TuningConfig,
        huber_c: float,
        seed: int,
        epochs: float,
        conditioned: bool,
        lockstep: bool = False,
    ):
        super().__init__(process, huber_c, seed, conditioned, lockstep, same_dropout=True)
        self.config, self.epochs = config, epochs

    def pairs(self, ids: Ids, epoch: int) -> tuple[Floats, Floats]:
        """(sigma, r) of each visit; r = 0 stands for the image itself."""
        c = self.config
        stage = 1 + min(int(c.stages * epoch / max(self.epochs, 1)), c.stages - 1)
        sigma = lognormal(self.process, self.seed, ids, epoch, c.mean, c.deviation)
        near = 1 + c.k * special.expit(-c.b * sigma)
        r = sigma * (1 - near / c.q**stage)
        return sigma, np.where(r < self.process.lowest, 0.0, r)

    def plan(self, ids: Ids, epoch: int) -> Visits:
        sigma, r = self.pairs(ids, epoch)
        fresh = np.flatnonzero(r > 0)
        return self.visits(
            ids,
            epoch,
            self.process.time(sigma),
            noise.keys(self.seed, Stream.NOISE, ids, epoch),
            guide=(r == 0).astype(np.float64),
            weight=1 / (sigma - r),
            fresh=fresh,
            fresh_times=self.process.time(r[fresh]),
        )


def lognormal(process: Process, seed: int, ids: Ids, epoch: int, mean: float, deviation: float) -> Floats:
    """sigma [B] with ln sigma ~ N(mean, deviation^2), clipped to the process's levels."""
    u = noise.uniform(noise.keys(seed, Stream.TIME, ids, epoch))
    drawn: Floats = np.exp(mean + deviation * special.ndtri(u))
    return drawn.clip(process.lowest, process.highest)
