"""The images and visits of the coming steps, made ready in a background thread."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from udddm.data.dataset import ImageDataset
from udddm.objective import Objective, Visits
from udddm.order import Order


@dataclass
class StepInput:
    """What one rank trains on in a step, but for the x0-state."""

    images: torch.Tensor
    """[b, C, H, W] float32 in [-1, 1]."""
    labels: torch.Tensor | None
    """[b] int64."""
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
        labelled: bool,
    ):
        self.order, self.lanes, self.dataset, self.objective = order, lanes, dataset, objective
        self.device, self.labelled = device, labelled
        self._pool = ThreadPoolExecutor(1, "data")
        self._next = step
        self._pending: deque[Future[StepInput]] = deque()
        for _ in range(depth):
            self._ask()

    def _ask(self) -> None:
        self._pending.append(self._pool.submit(self._make, self._next))
        self._next += 1

    def _make(self, global_step: int) -> StepInput:
        epoch, step = divmod(global_step, self.order.steps)
        batch = self.order.batch_of(self.lanes, epoch, step)
        images, labels = self.dataset.batch(batch.ids)
        weights = torch.from_numpy(batch.weights / batch.total)
        tensor = torch.from_numpy(labels) if self.labelled and labels is not None else None
        made = StepInput(images, tensor, weights, self.objective.plan(batch.ids, epoch))
        if self.device.type == "cuda":
            made.images, made.weights = images.pin_memory(), weights.pin_memory()
            made.labels = None if tensor is None else tensor.pin_memory()
            made.visits = made.visits.pinned()
        return made

    def next(self) -> StepInput:
        """The next step's inputs, on the device once its stream gets there."""
        made = self._pending.popleft().result()
        self._ask()
        if self.device.type == "cuda":
            made.images = made.images.to(self.device, non_blocking=True)
            made.weights = made.weights.to(self.device, non_blocking=True)
            made.labels = None if made.labels is None else made.labels.to(self.device, non_blocking=True)
            made.visits = made.visits.to(self.device)
        return made

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
