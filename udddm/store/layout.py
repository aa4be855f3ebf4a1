"""Which part of the x0-state a store holds, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from udddm.order import Order
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

    @property
    def state_bytes(self) -> int:
        """Stored bytes of the own lanes' samples."""
        return self.slots * self.row_bytes
