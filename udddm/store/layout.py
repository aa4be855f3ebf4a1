"""Which part of the x0-state one rank's store holds, and in which form."""

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
    """The device on which the training step expects the states."""

    @property
    def row_bytes(self) -> int:
        """Stored bytes per sample."""
        return math.prod(self.shape) * self.encoding.array.itemsize

    @property
    def slots(self) -> int:
        """Number of samples of the rank's lanes."""
        return self.order.lane_start(self.lanes.stop) - self.order.lane_start(self.lanes.start)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(lane, chunk) of every chunk of the rank's lanes, in slot order."""
        for lane in self.lanes:
            for chunk in range(self.order.num_chunks(lane)):
                yield lane, chunk

    def chunk_slots(self, lane: int, chunk: int) -> slice:
        """The slots of a chunk, counted from 0 at the rank's first slot."""
        own = self.order.lane_start(lane) - self.order.lane_start(self.lanes.start)
        start = own + chunk * self.order.chunk_size
        return slice(start, start + self.order.chunk_slots(lane, chunk))

    @property
    def step_samples(self) -> int:
        """Rows of a step's batch, including padding."""
        return len(self.lanes) * self.order.samples_per_lane_step

    def step_slots(self, epoch: int, step: int) -> tuple[Indices, Indices]:
        """The slots, counted from the rank's first slot, and the batch rows of the samples that a step visits.

        All other rows of the batch are padding.
        """
        batch = self.order.batch_of(self.lanes, epoch, step)
        rows = np.flatnonzero(batch.weights)
        return batch.slots[rows] - self.order.lane_start(self.lanes.start), rows

    @property
    def state_bytes(self) -> int:
        """Stored bytes of the samples of the rank's lanes."""
        return self.slots * self.row_bytes
