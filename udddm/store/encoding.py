"""How the x0-state is stored: fp32, fp16, bf16, uint8 or bytes, and generation 0."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from udddm import rng
from udddm.errors import StoreError
from udddm.rng import Stream

StateDtype = Literal["fp32", "fp16", "bf16", "uint8", "bytes"]
Rows = npt.NDArray[Any]
"""Encoded states [n, C, H, W] in an encoding's `array` dtype."""

_HALF_MAX = 65504.0


@cache
def _levels(device: torch.device) -> torch.Tensor:
    """The 256 values of uint8, in float32. Computed on the host: a GPU divides with another rounding."""
    return torch.arange(256, dtype=torch.float32).div(127.5).sub(1).to(device)


class Encoding:
    """Converts float32 states to stored numbers and back.

    `uint8` rounds [-1, 1] to the nearest of 256 evenly spaced values and clamps values outside; its error within
    [-1, 1] is at most 1/255. Zarr has no bfloat16, so bf16 is stored as uint16 with the same bits.

    `bytes` is for rows that hold several tensors (`udddm.store.packing`): uint8 in memory, in the store, and where the
    others have float32. Nothing is converted, and generation 0 is zeros.
    """

    def __init__(self, name: StateDtype):
        self.name = name
        self.tensor: torch.dtype = {
            "fp32": torch.float32,
            "fp16": torch.float16,
            "bf16": torch.bfloat16,
            "uint8": torch.uint8,
            "bytes": torch.uint8,
        }[name]
        self.array = np.dtype({"fp32": "<f4", "fp16": "<f2", "bf16": "<u2", "uint8": "u1", "bytes": "u1"}[name])

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Convert float32 [n, C, H, W] to the stored torch dtype, on the same device."""
        if self.name == "uint8":
            return values.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        if self.name == "fp16":
            return values.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)
        return values.to(self.tensor)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """Convert stored numbers to float32, on the same device."""
        if self.name == "uint8":
            return _levels(stored.device)[stored.long()]
        if self.name == "bytes":
            return stored
        return stored.float()

    def to_array(self, stored: torch.Tensor) -> Rows:
        """View an encoded host tensor as the array that is written."""
        return (stored.view(torch.uint16) if self.name == "bf16" else stored).numpy()

    def to_tensor(self, rows: Rows) -> torch.Tensor:
        """View an array as the host tensor that `decode` takes; a read-only array is copied."""
        tensor = torch.from_numpy(rows if rows.flags.writeable else rows.copy())
        return tensor.view(torch.bfloat16) if self.name == "bf16" else tensor

    def recode(self, rows: Rows, source: Encoding) -> Rows:
        """Convert rows from the encoding `source` to this one. Raises StoreError if only one of them is `bytes`."""
        if source.name == self.name:
            return rows
        if "bytes" in (source.name, self.name):
            raise StoreError(f"the state is stored as {source.name}, which cannot be converted to {self.name}")
        return self.to_array(self.encode(source.decode(source.to_tensor(rows))))


def generation_zero(
    seed: int,
    samples: npt.NDArray[np.int64],
    shape: tuple[int, ...],
    encoding: Encoding,
    device: torch.device | None = None,
) -> torch.Tensor:
    """x_0^(0) ~ N(0, I) of `samples`, encoded; zeros for `bytes`. It is computed when needed, never stored."""
    if encoding.name == "bytes":
        return torch.zeros(len(samples), *shape, dtype=encoding.tensor, device=device)
    keys = rng.as_tensor(rng.keys(seed, Stream.INITIAL_STATE, samples))
    return encoding.encode(rng.normal(keys if device is None else keys.to(device), shape))
