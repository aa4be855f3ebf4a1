"""Horizontal flips, drawn once per chain, so that a stored state shows the image that its next visit shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from udddm import rng
from udddm.objectives.base import Visits
from udddm.rng import Stream


@dataclass(frozen=True)
class HorizontalFlips:
    """Mirrors half of the images.

    The decision depends on the noise key of the visit, which is a function of (seed, sample, epoch) and is the same for
    all visits of a chain, as for label dropout.
    """

    seed: int

    def mirrored(self, visits: Visits) -> npt.NDArray[np.bool_]:
        """A mask [B] of the visits whose images are mirrored. `visits` must be on the host."""
        found: npt.NDArray[np.bool_] = rng.uniform(rng.keys(self.seed, Stream.FLIP, visits.noise_key.numpy())) < 0.5
        return found

    def __call__(self, images: torch.Tensor, visits: Visits) -> torch.Tensor:
        """The images [B, C, H, W] to train on. `images` is not modified."""
        mirrored = torch.from_numpy(self.mirrored(visits))[:, None, None, None]
        return torch.where(mirrored, images.flip(3), images)
