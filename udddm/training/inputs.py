"""The images and visits of the coming steps, prefetched in a background thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch

from udddm.config import RunConfig
from udddm.data import ImageDataset
from udddm.data.images import Ids
from udddm.data.reading import LabeledImages, open_reader
from udddm.diffusion.conditions import ConditionImages
from udddm.log import log
from udddm.objectives import HorizontalFlips, LabelDropout
from udddm.objectives.base import Objective, Visits
from udddm.objectives.transfer import Packed
from udddm.order import Batch, Order
from udddm.runs.conditions import conditions_of
from udddm.storage.threads import Worker

SLOW = 0.2
"""Fraction of the time that steps may wait for their images before a warning."""
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


Inputs = StepInput | Packed[StepInput]


@dataclass(frozen=True)
class InputBuilder:
    """Builds one rank's inputs for any step, on the host. The result depends only on the step."""

    order: Order
    lanes: range
    dataset: ImageDataset
    objective: Objective
    device: torch.device
    """The device that uses the inputs."""
    labels: LabelDropout | None
    """Selects the visits that keep their label. None if the network takes no labels."""
    flips: HorizontalFlips | None = None
    """Selects the visits whose image is mirrored. None mirrors none."""
    parts: int = 1
    """The number of equal micro-batches per step."""
    conditions: ConditionImages | None = None
    """Makes the conditioning images. None if they do not come from the data set."""

    @classmethod
    def of(cls, trained: tuple[Order, range, ImageDataset, Objective], config: RunConfig, device: torch.device) -> Self:
        """The inputs of a run with `config`, of a rank's order and lanes, its data set, and the objective."""
        return cls(
            *trained,
            device,
            LabelDropout.of(config) if config.network.classes else None,
            HorizontalFlips(config.seed) if config.data.flip else None,
            config.train.grad_accumulation,
            conditions_of(config, trained[2]),
        )

    def batch_of(self, global_step: int) -> tuple[int, Batch]:
        """The epoch of a step, and the samples that this rank visits in it."""
        epoch, step = divmod(global_step, self.order.steps_per_epoch)
        return epoch, self.order.batch_of(self.lanes, epoch, step)

    def build(self, global_step: int, read: Callable[[Ids], LabeledImages] | None = None) -> list[StepInput]:
        """Returns one input per micro-batch, from what `read` returns for its samples; by default the data set's.

        Raises the errors of the data set.
        """
        epoch, batch = self.batch_of(global_step)
        images, labels = (read or self.dataset.read)(batch.ids)
        weights = torch.from_numpy(batch.weights / batch.total)
        size = len(batch.ids) // self.parts
        made = []
        for first in range(0, len(batch.ids), size):
            part = slice(first, first + size)
            visits = self.objective.plan(batch.ids[part], epoch)
            shown = images[part] if self.flips is None else self.flips(images[part], visits)
            if self.conditions is not None:
                shown, conditions = self.conditions.split(shown, visits.noise_key)
                visits = visits.conditioned_on(conditions)
            given = None
            if self.labels is not None and labels is not None:
                given = self.labels(torch.from_numpy(labels[part]), visits)
            made.append(StepInput(shown, given, weights[part], visits))
        return made

    def packed(self, global_step: int, read: Callable[[Ids], LabeledImages] | None = None) -> list[Inputs]:
        """What `build` returns, in page-locked memory if the device is a GPU."""
        made = self.build(global_step, read)
        return [Packed(part, pin=True) for part in made] if self.device.type == "cuda" else [*made]


class Prefetch:
    """Inputs of consecutive steps starting at `step`, built `depth` steps ahead in a background thread.

    `processes` other processes read the images; with 0, the thread reads them.
    """

    def __init__(self, builder: InputBuilder, *, step: int, depth: int, processes: int = 0):
        self._builder, self._next = builder, step
        self._processes = processes
        self._reader = open_reader(builder.dataset, processes)
        self._waited = 0.0  # seconds, since the last report
        self._reports, self._advised = 0, False
        self._worker = Worker("data")
        self._pending: deque[Future[list[Inputs]]] = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        read = None if self._reader is None else self._reader.request(self._builder.batch_of(self._next)[1].ids)
        self._pending.append(self._worker.submit(partial(self._builder.packed, self._next, read)))
        self._next += 1

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next inputs. Returns whether `next` returns or raises at once."""
        began = time.perf_counter()
        done = self._pending[0].done() or bool(wait([self._pending[0]], seconds).done)
        self._waited += time.perf_counter() - began
        return done

    def next(self) -> list[StepInput]:
        """Returns the next step's micro-batches. Copies to a GPU are asynchronous, on the current stream. Raises the
        errors of the data set."""
        began = time.perf_counter()
        made, device = self._pending.popleft().result(), self._builder.device
        self._waited += time.perf_counter() - began
        self._submit()
        return [part.to(device) if isinstance(part, Packed) else part for part in made]

    def wait_fraction(self, seconds: float) -> float:
        """The fraction of the last `seconds` for which steps waited for their images. Says once what helps."""
        fraction, self._waited = self._waited / seconds, 0.0
        self._reports += 1  # the first one contains the start
        slow = self._reports > 1 and fraction > SLOW and not self._builder.dataset.in_memory
        if slow and not self._advised and 0 in self._builder.lanes:
            self._advised = True
            workers = max(1, 2 * self._processes)
            log.warning(
                f"steps wait for their images for {fraction:.0%} of the time: data.workers={workers} reads them in "
                f"{workers} other {'processes' if workers > 1 else 'process'} per rank, with the same result"
            )
        return fraction

    def close(self) -> None:
        """Stop the background thread and the processes, and drop the inputs that are pending."""
        if self._reader is not None:
            self._reader.close()
        self._worker.close(PATIENCE)
