"""Pretraining: a run that trains a denoiser before its objective."""

from __future__ import annotations

from udddm.objectives.base import Ids, Objective, Visits


class Pretrained(Objective):
    """`first` for `epochs` epochs, then `then`, whose own epochs count from there."""

    def __init__(self, first: Objective, then: Objective, epochs: int):
        self.first, self.then, self.epochs = first, then, epochs

    def plan(self, ids: Ids, epoch: int) -> Visits:
        if epoch < self.epochs:
            return self.first.plan(ids, epoch)
        return self.then.plan(ids, epoch - self.epochs)
