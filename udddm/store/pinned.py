"""The `pinned` store: the x0-state in host memory, behind the same pipeline as the zarr store.

The state itself is in ordinary memory. The batches that are copied to and from a GPU are page-locked and copied on a
side stream. Page-locking the entire state would withhold that memory from the operating system and gain nothing.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from udddm.store.autotune import Limits
from udddm.store.base import StateSource, StoreContext
from udddm.store.encoding import Rows, generation_zero
from udddm.store.layout import StateLayout
from udddm.store.pipeline import ChunkTable, HostStore


class MemoryTable(ChunkTable):
    """One array per lane. A chunk of the next generation overwrites its predecessor, which has been read by then."""

    def __init__(self, layout: StateLayout):
        self.order, self.shape, self.encoding = layout.order, layout.shape, layout.encoding
        self._lanes = {
            lane: np.empty((layout.order.lane_slots(lane), *layout.shape), layout.encoding.array)
            for lane in layout.lanes
        }

    def open(self, epoch: int, step: int, source: StateSource | None) -> None:
        for lane in self._lanes:
            for chunk in range(self.order.num_chunks(lane)):
                if source is None:
                    samples = self.order.chunk_samples(lane, chunk)
                    zero = generation_zero(self.order.seed, samples, self.shape, self.encoding)
                    rows = self.encoding.to_array(zero)
                else:
                    rows = self.encoding.recode(source.rows(lane, chunk), source.encoding)
                self._rows(lane, chunk)[:] = rows

    def _rows(self, lane: int, chunk: int) -> Rows:
        start = chunk * self.order.chunk_size
        return self._lanes[lane][start : start + self.order.chunk_slots(lane, chunk)]

    def load(self, generation: int, lane: int, chunk: int) -> Rows:
        return self._rows(lane, chunk)

    def save(self, generation: int, lane: int, chunk: int, rows: Rows) -> None:
        self._rows(lane, chunk)[:] = rows


class PinnedStore(HostStore):
    def __init__(self, layout: StateLayout, table: ChunkTable | None = None, limits: Limits = Limits()):
        super().__init__(layout, table or MemoryTable(layout), limits)

    @classmethod
    def create(cls, context: StoreContext) -> Self:
        return cls(context.layout, limits=Limits.of(context.config))

    def describe(self) -> str:
        return "host memory, copied in the background"
