"""Plans refined pairs (refined.py): which visits repeat the noise and the level of the previous one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from udddm import rng
from udddm.config import RefinedConfig
from udddm.objectives.base import Ids
from udddm.objectives.refined import Refined, initial_values
from udddm.rng import Stream


class RefinedPairs:
    """Plans refined visits: a pure function of (seed, sample, epoch).

    From `config.start` on, the epochs of a sample form chains of `config.length` visits, staggered between samples. A
    key decides which chains keep their noise and level, so that a share `config.share` of the visits above
    `config.above` is refined. Chains end where the levels of the objective change, at the epochs `stages`.
    """

    def __init__(self, config: RefinedConfig, seed: int, epochs: float, stages: Iterable[int] = ()):
        self.config, self.seed = config, seed
        self.start = math.ceil(config.start * epochs)
        self._begins = sorted({self.start, *(stage for stage in stages if stage > self.start)})
        self._chained = config.share * config.length / (config.length - 1)

    @property
    def read_state(self) -> bool:
        """Whether visits are refined from the x0-state."""
        return self.config.share > 0 and self.config.source == "store"

    def drawn(self, ids: Ids, epoch: int) -> Ids:
        """The epoch in which the level of each visit [B] was drawn: `epoch`, or an earlier one of its chain."""
        config, length = self.config, self.config.length
        if not config.share or config.source == "network" or epoch < self.start:
            return np.full(len(ids), epoch)
        begin = max(each for each in self._begins if each <= epoch)
        since = epoch - begin
        offset = rng.randint(length, rng.keys(self.seed, Stream.CHAIN_OFFSET, ids, begin))
        chain, visit = np.divmod(since + offset, length)
        visit = np.where(chain == 0, since, visit)
        chained = rng.uniform(rng.keys(self.seed, Stream.REFINED, ids, begin, chain)) < self._chained
        return epoch - np.where(chained, visit, 0)

    def plan(self, ids: Ids, epoch: int, drawn: Ids, sigma: npt.NDArray[np.float64]) -> tuple[Ids, Refined | None]:
        """The epoch in which the noise of each visit was drawn [B], and which visits are refined; None if no visit can
        be. `drawn` [B] are the epochs of the levels `sigma` [B]."""
        config = self.config
        if not config.share:
            return drawn, None
        above = sigma > config.above
        if config.source == "network":
            chosen = rng.uniform(rng.keys(self.seed, Stream.REFINED, ids, epoch)) < config.share
            rows = above & chosen & (epoch >= self.start)
        else:
            rows = above & (drawn < epoch)
        initial = initial_values(self.seed, ids, rows)
        refined = Refined(
            torch.from_numpy(rows), initial, config.min_sharpness, config.source, config.use, some=bool(rows.any())
        )
        return np.where(rows, drawn, epoch), refined
