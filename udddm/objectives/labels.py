"""Label dropout: visits without a label, so that one network learns both terms of guidance (Ho & Salimans 2022)."""

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
    """Replaces the label of a visit with `none`, the class for "no label", with probability `share`.

    The decision depends on the noise key of the visit, which is a function of (seed, sample, epoch) and is the same for
    all visits of a chain, so that a stored teacher and its student have the same label.
    """

    seed: int
    share: float
    none: int

    @classmethod
    def of(cls, config: RunConfig) -> LabelDropout:
        """The label dropout of a run."""
        return cls(config.seed, config.network.label_dropout, config.network.classes)

    def drops(self, visits: Visits) -> npt.NDArray[np.bool_]:
        """A mask [B] of the visits whose labels are dropped. `visits` must be on the host."""
        keys = rng.keys(self.seed, Stream.LABEL_DROPOUT, visits.noise_key.numpy())
        found: npt.NDArray[np.bool_] = rng.uniform(keys) < self.share
        return found

    def __call__(self, labels: torch.Tensor, visits: Visits) -> torch.Tensor:
        """The labels [B] int64 to pass to the network. `labels` [B] is not modified."""
        if not self.share:
            return labels
        return labels.masked_fill(torch.from_numpy(self.drops(visits)), self.none)
