"""The `gpu` store: the x0-state as one tensor on the training device, as the paper keeps it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from udddm.store.base import StateSource, X0Store
from udddm.store.encoding import Rows, generation_zero
from udddm.store.layout import StateLayout
from udddm.store.snapshot import write_full


class DeviceStore(X0Store):
    """Reads gather rows and writes scatter them in place, on the device and without I/O."""

    def __init__(self, layout: StateLayout):
        super().__init__(layout)
        self._first = layout.order.lane_start(layout.lanes.start)
        self._state = torch.empty(layout.slots, *layout.shape, dtype=layout.encoding.tensor, device=layout.device)

    @classmethod
    def memory_kind(cls, device: torch.device) -> str:
        return "GPU memory" if device.type == "cuda" else "host memory (no GPU here)"

    def describe(self) -> str:
        return f"a tensor in {self.memory_kind(self.device)}"

    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        self.epoch, self.step = epoch, step
        for lane in self.lanes:
            for chunk in range(self.order.num_chunks(lane)):
                place = self._place(lane, chunk)
                if source is None:
                    samples = self.order.chunk_samples(lane, chunk)
                    rows = generation_zero(self.order.seed, samples, self.shape, self.encoding)
                else:
                    rows = self.encoding.to_tensor(self.encoding.recode(source.rows(lane, chunk), source.encoding))
                self._state[place] = rows.to(self.device)

    def _place(self, lane: int, chunk: int) -> slice:
        start = self.order.lane_start(lane) + chunk * self.order.chunk_size - self._first
        return slice(start, start + self.order.chunk_slots(lane, chunk))

    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Local slot and batch place of each of the step's samples."""
        batch = self.order.batch_of(self.lanes, self.epoch, self.step)
        places = np.flatnonzero(batch.weights)
        both = torch.from_numpy(np.stack([batch.slots[places] - self._first, places]))
        if self.device.type == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        slots, rows = both
        return slots, rows

    def read(self) -> torch.Tensor:
        slots, places = self._slots()
        size = len(self.lanes) * self.order.samples_per_lane_step
        if len(slots) == size:
            return self.encoding.decode(self._state[slots])
        out = torch.zeros(size, *self.shape, dtype=self._state.dtype, device=self.device)
        out[places] = self._state[slots]
        return self.encoding.decode(out)

    def _write(self, values: torch.Tensor) -> None:
        slots, places = self._slots()
        self._state[slots] = self.encoding.encode(values)[places]

    def rows(self, lane: int, chunk: int) -> Rows:
        return self.encoding.to_array(self._state[self._place(lane, chunk)].cpu())

    def snapshot(self, directory: Path) -> None:
        write_full(self, directory)

    def close(self) -> None:
        return
