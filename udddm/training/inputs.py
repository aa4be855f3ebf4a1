"""The images and visits of the coming steps, made ready in a background thread."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from udddm.data.dataset import ImageDataset
from udddm.objectives import LabelDropout
from udddm.objectives.base import Objective, Visits
from udddm.order import Order


@dataclass
class StepInput:
    """What one rank trains on in a step, or in one of its micro-batches, but for the x0-state."""

    images: torch.Tensor
    """[b, C, H, W] float32 in [-1, 1]."""
    labels: torch.Tensor | None
    """[b] int64, after label dropout."""
    weights: torch.Tensor
    """[b]: 1 / (samples of the step over all ranks) for samples, 0 for padding."""
    visits: Visits


class Prefetch:
    """Inputs of consecutive steps from `step` on, `depth` of them ahead. `next` raises what the data set raised."""

    def __init__(
        self,
        order: Order,
        lanes: range,
        dataset: ImageDataset,
        objective: Objective,
        device: torch.device,
        *,
        step: int,
        depth: int,
        labels: LabelDropout | None,
        parts: int = 1,
    ):
        """`labels` says which visits keep theirs; None: the network takes none. `parts` is the number of equal
        micro-batches that a step is cut into."""
        self.order, self.lanes, self.dataset, self.objective = order, lanes, dataset, objective
        self.device, self.labels, self.parts = device, labels, parts
        self._pool = ThreadPoolExecutor(1, "data")
        self._next = step
        self._pending: deque[Future[list[StepInput]]] = deque()
        for _ in range(depth):
            self._ask()

    def _ask(self) -> None:
        self._pending.append(self._pool.submit(self._make, self._next))
        self._next += 1

    def _make(self, global_step: int) -> list[StepInput]:
        epoch, step = divmod(global_step, self.order.steps_per_epoch)
        batch = self.order.batch_of(self.lanes, epoch, step)
        images, labels = self.dataset.batch(batch.ids)
        weights = torch.from_numpy(batch.weights / batch.total)
        if self.device.type == "cuda":
            images, weights = images.pin_memory(), weights.pin_memory()
        size = len(batch.ids) // self.parts
        made = []
        for first in range(0, len(batch.ids), size):
            part = slice(first, first + size)
            visits = self.objective.plan(batch.ids[part], epoch)
            given = None
            if self.labels is not None and labels is not None:
                given = self.labels(torch.from_numpy(labels[part]), visits)
            if self.device.type == "cuda":
                visits, given = visits.pinned(), None if given is None else given.pin_memory()
            made.append(StepInput(images[part], given, weights[part], visits))
        return made

    def next(self) -> list[StepInput]:
        """The next step's micro-batches, on the device once its stream gets there."""
        made = self._pending.popleft().result()
        self._ask()
        if self.device.type == "cuda":
            for part in made:
                part.images = part.images.to(self.device, non_blocking=True)
                part.weights = part.weights.to(self.device, non_blocking=True)
                part.labels = None if part.labels is None else part.labels.to(self.device, non_blocking=True)
                part.visits = part.visits.to(self.device)
        return made

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
