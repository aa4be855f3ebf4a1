"""Label dropout: visits that see no label, so that one network learns both terms of guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from udddm import rng
from udddm.config import RunConfig
from udddm.objectives.base import Visits
from udddm.rng import Stream


@dataclass(frozen=True)
class LabelDropout:
    """A visit loses its label with probability `share`; `none` is the class that stands for that.

    Decided by the visit's noise key, which is a function of (seed, sample, epoch) and stays the same within a chain: a
    stored teacher and its student saw the same label.
    """

    seed: int
    share: float
    none: int

    @classmethod
    def of(cls, config: RunConfig) -> LabelDropout:
        return cls(config.seed, config.network.label_dropout, config.network.classes)

    def drops(self, visits: Visits) -> npt.NDArray[np.bool_]:
        """Which visits [B], still on the host, lose their labels."""
        keys = rng.keys(self.seed, Stream.LABEL_DROPOUT, visits.noise_key.numpy())
        found: npt.NDArray[np.bool_] = rng.uniform(keys) < self.share
        return found

    def __call__(self, labels: torch.Tensor, visits: Visits) -> torch.Tensor:
        """The labels [B] int64 that the network is given. `labels` is left as it was."""
        if not self.share:
            return labels
        return labels.masked_fill(torch.from_numpy(self.drops(visits)), self.none)
