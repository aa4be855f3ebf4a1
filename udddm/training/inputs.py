"""The images and visits of the coming steps, prefetched in a background thread."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import torch

from udddm.data.dataset import ImageDataset
from udddm.objectives import HorizontalFlips, LabelDropout
from udddm.objectives.base import Objective, Visits
from udddm.order import Order
from udddm.storage.threads import Worker

PATIENCE = 2.0
"""Seconds that `Prefetch.close` waits for the data set, which may never answer."""


@dataclass
class StepInput:
    """The inputs of one rank for a step, or for one of its micro-batches, except the x0-state."""

    images: torch.Tensor
    """[b, C, H, W] float32 in [-1, 1]."""
    labels: torch.Tensor | None
    """[b] int64, after label dropout."""
    weights: torch.Tensor
    """[b]: 1 / (samples of the step over all ranks) for samples, 0 for padding."""
    visits: Visits
    """What to train on each image: noise level, noise, target and loss weight."""


@dataclass(frozen=True)
class InputBuilder:
    """Builds one rank's inputs for any step, on the host. The result depends only on the step."""

    order: Order
    lanes: range
    dataset: ImageDataset
    objective: Objective
    device: torch.device
    """The device that uses the inputs. For CUDA they are built in page-locked memory."""
    labels: LabelDropout | None
    """Selects the visits that keep their label. None if the network takes no labels."""
    flips: HorizontalFlips | None = None
    """Selects the visits whose image is mirrored. None mirrors none."""
    parts: int = 1
    """The number of equal micro-batches per step."""

    def build(self, global_step: int) -> list[StepInput]:
        """Returns one input per micro-batch. Raises the errors of the data set."""
        epoch, step = divmod(global_step, self.order.steps_per_epoch)
        batch = self.order.batch_of(self.lanes, epoch, step)
        images, labels = self.dataset.batch(batch.ids)
        weights = torch.from_numpy(batch.weights / batch.total)
        if self.device.type == "cuda":
            weights = weights.pin_memory()
        size = len(batch.ids) // self.parts
        made = []
        for first in range(0, len(batch.ids), size):
            part = slice(first, first + size)
            visits = self.objective.plan(batch.ids[part], epoch)
            shown = images[part] if self.flips is None else self.flips(images[part], visits)
            given = None
            if self.labels is not None and labels is not None:
                given = self.labels(torch.from_numpy(labels[part]), visits)
            if self.device.type == "cuda":
                shown, visits, given = (
                    shown.pin_memory(),
                    visits.pinned(),
                    None if given is None else given.pin_memory(),
                )
            made.append(StepInput(shown, given, weights[part], visits))
        return made


class Prefetch:
    """Inputs of consecutive steps starting at `step`, built `depth` steps ahead in a background thread."""

    def __init__(self, builder: InputBuilder, *, step: int, depth: int):
        self._builder, self._next = builder, step
        self._worker = Worker("data")
        self._pending: deque[Future[list[StepInput]]] = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        self._pending.append(self._worker.submit(partial(self._builder.build, self._next)))
        self._next += 1

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next inputs. Returns whether `next` returns or raises at once."""
        return self._pending[0].done() or bool(wait([self._pending[0]], seconds).done)

    def next(self) -> list[StepInput]:
        """Returns the next step's micro-batches. Copies to a GPU are asynchronous, on the current stream. Raises the
        errors of the data set."""
        made, device = self._pending.popleft().result(), self._builder.device
        self._submit()
        if device.type == "cuda":
            for part in made:
                part.images = part.images.to(device, non_blocking=True)
                part.weights = part.weights.to(device, non_blocking=True)
                part.labels = None if part.labels is None else part.labels.to(device, non_blocking=True)
                part.visits = part.visits.to(device)
        return made

    def close(self) -> None:
        """Stop the background thread and drop the inputs that are pending."""
        self._worker.close(PATIENCE)
