"""Which part of the x0-state a store holds, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from udddm.order import Indices, Order
from udddm.store.encoding import Encoding


@dataclass(frozen=True)
class StateLayout:
    """One rank's part of the x0-state."""

    order: Order
    lanes: range
    """The lanes that the rank owns."""
    shape: tuple[int, ...]
    """(C, H, W) of a sample's state."""
    encoding: Encoding
    device: torch.device
    """Where the training step wants the states."""

    @property
    def row_bytes(self) -> int:
        """Stored bytes of a sample."""
        return math.prod(self.shape) * self.encoding.array.itemsize

    @property
    def slots(self) -> int:
        """Samples of the own lanes."""
        return self.order.lane_start(self.lanes.stop) - self.order.lane_start(self.lanes.start)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(lane, chunk) of every chunk of the own lanes, in slot order."""
        for lane in self.lanes:
            for chunk in range(self.order.num_chunks(lane)):
                yield lane, chunk

    def chunk_slots(self, lane: int, chunk: int) -> slice:
        """Where a chunk of an own lane is among the own lanes' slots, which count from 0."""
        own = self.order.lane_start(lane) - self.order.lane_start(self.lanes.start)
        start = own + chunk * self.order.chunk_size
        return slice(start, start + self.order.chunk_slots(lane, chunk))

    @property
    def step_samples(self) -> int:
        """Rows of a step's batch, padding included."""
        return len(self.lanes) * self.order.samples_per_lane_step

    def step_slots(self, epoch: int, step: int) -> tuple[Indices, Indices]:
        """Of the samples that a step visits, their slots among the own lanes' and their rows in the step's batch. Rows
        of the batch that are not named are padding."""
        batch = self.order.batch_of(self.lanes, epoch, step)
        rows = np.flatnonzero(batch.weights)
        return batch.slots[rows] - self.order.lane_start(self.lanes.start), rows

    @property
    def state_bytes(self) -> int:
        """Stored bytes of the own lanes' samples."""
        return self.slots * self.row_bytes
