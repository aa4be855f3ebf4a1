"""Pretraining: training a denoiser before the objective of a run."""

from __future__ import annotations

from udddm.objectives.base import Ids, Objective, Visits


class Pretrained(Objective):
    """`first` for `epochs` epochs, followed by `then`, whose epochs are counted from that point."""

    def __init__(self, first: Objective, then: Objective, epochs: int):
        self.first, self.then, self.epochs = first, then, epochs
        self.reads_state = first.reads_state or then.reads_state
        self.refines = then.refines

    def plan(self, ids: Ids, epoch: int) -> Visits:
        if epoch < self.epochs:
            return self.first.plan(ids, epoch)
        return self.then.plan(ids, epoch - self.epochs)

    def pretrains(self, epoch: int) -> bool:
        return epoch < self.epochs

    def phase(self, epoch: int) -> str:
        return self.first.phase(epoch) if epoch < self.epochs else self.then.phase(epoch - self.epochs)
