"""Noise that is chosen for the images, as custom objectives: iCT with best-of-k noise and with batch optimal transport.

    python benchmarks/quality/refined.py run --images 20000 --seeds 20 21 22 \\
        --arms ict ict-best-of-8 ict-batch-ot --json benchmarks/results/couplings-digits.json

`BestOfK` draws k noises for each visit and takes the nearest to the image (Li et al. 2025, arXiv 2505.18521, for
denoisers). Like every objective of the package it is a function of (seed, sample, epoch). Nearer noise is shorter, and
points to the image: it is not distributed as the noise that sampling starts from.

`BatchOT` draws one noise per visit, and pairs images and noises within the batch so that the sum of squared distances
is least (Pooladian et al. 2023, arXiv 2304.14772; for consistency models Issenhuth et al. 2024, arXiv 2406.09570). The
noise keeps its distribution. The pairs are a function of the batch, which is a weaker promise than that of the package:
a run that resumes is the same, but its result changes with the number of ranks and with `train.grad_accumulation`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import numpy as np
import torch
from pydantic import Field

from udddm import rng
from udddm.config import DataConfig, Section
from udddm.data import ImageDataset, load_dataset
from udddm.objectives import ObjectiveContext, Visits
from udddm.objectives.base import Ids
from udddm.objectives.ict import ICT
from udddm.rng import Stream


class Coupled(ICT):
    """iCT whose noise depends on the images."""

    class Settings(Section):
        """The section `objective.settings`."""

        data: str = Field("digits", description="the data set of the run, `data.name`")

    images: ImageDataset

    @classmethod
    def create(cls, context: ObjectiveContext, settings: Settings | None = None) -> Self:
        """The objective of a run. It reads the images itself, because a plan is made without them."""
        settings = settings or cls.Settings()
        built = super().create(context)
        built.images = ImageDataset(load_dataset(DataConfig(name=settings.data)))
        return built

    def shown(self, ids: Ids) -> torch.Tensor:
        """The images of samples `ids`: [B, D]."""
        return self.images.batch(ids % len(self.images))[0].flatten(1)

    def noise(self, keys: rng.Keys) -> torch.Tensor:
        """The noise of `keys` [B]: [B, D]."""
        return rng.normal(rng.as_tensor(keys), self.images.shape).flatten(1)


class BestOfK(Coupled):
    """iCT that draws k noises for each visit and takes the nearest to the image."""

    class Settings(Coupled.Settings):
        k: int = Field(8, ge=1, description="noises per visit")

    k = 1

    @classmethod
    def create(cls, context: ObjectiveContext, settings: Coupled.Settings | None = None) -> Self:
        built = super().create(context, settings)
        assert isinstance(settings, cls.Settings)
        built.k = settings.k
        return built

    def plan(self, ids: Ids, epoch: int) -> Visits:
        shown = self.shown(ids)
        keys = np.stack([rng.keys(self.seed, Stream.NOISE, ids, epoch, i) for i in range(self.k)])
        distances = torch.stack([(self.noise(each) - shown).square().sum(1) for each in keys])
        chosen = keys[distances.argmin(0).numpy(), np.arange(len(ids))]
        return replace(super().plan(ids, epoch), noise_key=rng.as_tensor(chosen))


class BatchOT(Coupled):
    """iCT whose noises are assigned to the images of a batch with the least sum of squared distances."""

    def plan(self, ids: Ids, epoch: int) -> Visits:
        from scipy.optimize import linear_sum_assignment

        visits = super().plan(ids, epoch)
        noise = rng.normal(visits.noise_key, self.images.shape).flatten(1)
        _, chosen = linear_sum_assignment(torch.cdist(self.shown(ids), noise).square().numpy())
        return replace(visits, noise_key=visits.noise_key[torch.from_numpy(chosen)])
