"""The `gpu` store: the x0-state as one tensor on the training device, as the paper keeps it."""

from __future__ import annotations

import numpy as np
import torch

from udddm.store.base import StateSource, X0Store
from udddm.store.encoding import Rows
from udddm.store.layout import StateLayout


class DeviceStore(X0Store):
    """Reads gather rows, and writes scatter them in place, on the device and without I/O."""

    def __init__(self, layout: StateLayout):
        super().__init__(layout)
        self._state = torch.empty(layout.slots, *layout.shape, dtype=layout.encoding.tensor, device=layout.device)
        self._places: tuple[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None
        """What `_visited` returned last, and for which (epoch, step): `put` follows `read` of the same step."""

    @classmethod
    def memory_kind(cls, device: torch.device) -> str:
        return "GPU memory" if device.type == "cuda" else "host memory (no GPU available)"

    def describe(self) -> str:
        return f"a tensor in {self.memory_kind(self.device)}"

    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        self.epoch, self.step = epoch, step
        for lane, chunk, rows in self.initial_rows(source):
            self._state[self.layout.chunk_slots(lane, chunk)] = self.encoding.to_tensor(rows).to(self.device)

    def _visited(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot and the batch row of each of the step's samples, on the device."""
        position = self.epoch, self.step
        if self._places is not None and self._places[0] == position:
            return self._places[1]
        both = torch.from_numpy(np.stack(self.layout.step_slots(self.epoch, self.step)))
        if self.device.type == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        slots, rows = both
        self._places = position, (slots, rows)
        return slots, rows

    def read(self) -> torch.Tensor:
        slots, rows = self._visited()
        size = self.layout.step_samples
        if len(slots) == size:
            return self.encoding.decode(self._state.index_select(0, slots))
        out = torch.zeros(size, *self.shape, dtype=self._state.dtype, device=self.device)
        out.index_copy_(0, rows, self._state.index_select(0, slots))
        return self.encoding.decode(out)

    def put(self, values: torch.Tensor) -> None:
        slots, rows = self._visited()
        encoded = self.encoding.encode(values)
        if len(rows) < len(encoded):
            encoded = encoded.index_select(0, rows)
        self._state.index_copy_(0, slots, encoded)  # copies rows, which is faster than indexing element by element

    def rows(self, lane: int, chunk: int) -> Rows:
        return self.encoding.to_array(self._state[self.layout.chunk_slots(lane, chunk)].cpu())

    def close(self) -> None:
        return
