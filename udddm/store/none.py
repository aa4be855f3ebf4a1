"""The `none` store, for objectives that do not read the x0-state."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import torch

from udddm.store.base import StateSource, X0Store
from udddm.store.encoding import Rows, generation_zero
from udddm.store.layout import StateLayout
from udddm.store.snapshot import write_none


class NoStore(X0Store):
    """Keeps nothing: reads return zeros, and a checkpoint holds only the position."""

    keeps_state: ClassVar[bool] = False

    def __init__(self, layout: StateLayout):
        super().__init__(layout)
        self._zeros = torch.zeros((), device=layout.device).expand(layout.step_samples, *layout.shape)

    @classmethod
    def resident_bytes(cls, layout: StateLayout) -> int:
        return 0

    def describe(self) -> str:
        return "nothing is kept"

    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        self.epoch, self.step = epoch, step

    def read(self) -> torch.Tensor:
        return self._zeros

    def put(self, values: torch.Tensor) -> None:
        return

    def rows(self, lane: int, chunk: int) -> Rows:
        """Generation 0, as for a chunk that was never written."""
        samples = self.order.chunk_samples(lane, chunk)
        return self.encoding.to_array(generation_zero(self.order.seed, samples, self.shape, self.encoding))

    def snapshot(self, directory: Path) -> None:
        write_none(self, directory)

    def close(self) -> None:
        return

    def sha256(self) -> str:
        return hashlib.sha256().hexdigest()
