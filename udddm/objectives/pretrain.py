"""TODO."""

from __future__ import annotations

import torch
from torch import nn

from udddm.objectives.base import Objective, Visits
from udddm.objectives.edm import EDM
from udddm.objectives.target import Ids


class Pretrained:
    """`first` for `epochs` epochs, then `then`, which counts its own from there."""

    def __init__(self, first: EDM, then: Objective, epochs: int):
        self.first, self.then, self.epochs = first, then, epochs

    def plan(self, ids: Ids, epoch: int) -> Visits:
        if epoch < self.epochs:
            return self.first.plan(ids, epoch)
        return self.then.plan(ids, epoch - self.epochs)

    def evaluated(self, visits: Visits) -> int:
        return self.then.evaluated(visits)  # of a denoiser's visits none is fresh

    def __call__(
        self,
        network: nn.Module,
        x0: torch.Tensor,
        state: torch.Tensor,
        visits: Visits,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.then(network, x0, state, visits, labels)
