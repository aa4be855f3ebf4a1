"""Several named tensors per sample in one row of bytes, which a store keeps with the encoding `bytes`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from udddm.errors import ConfigError, DataError

Spec = tuple[Sequence[int], torch.dtype]
"""The shape and dtype of one sample's tensor. The shape of a scalar is ()."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""The dtypes that a row may hold, by name."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Part:
    """A tensor's place in a row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int
    """The offset of its first byte."""

    @property
    def past(self) -> int:
        """The offset after its last byte."""
        return self.first + math.prod(self.shape) * self.dtype.itemsize

    def check(self, values: torch.Tensor, samples: int, device: torch.device) -> torch.Tensor:
        """`values` as `self.dtype`. Raises DataError unless they have the shape, device and kind of dtype."""
        if not isinstance(values, torch.Tensor):
            raise DataError(f"write({self.name}=...): expected a tensor, not a {type(values).__name__}")
        wanted = [samples, *self.shape]
        if list(values.shape) != wanted:
            raise DataError(
                f"write({self.name}=...): the shape is {list(values.shape)} instead of {wanted}: one row for each of "
                f"the step's {samples} samples, of the declared shape {list(self.shape)}"
            )
        if values.device != device:
            raise DataError(
                f"write({self.name}=...): the tensor is on {values.device} and the state is read and written on "
                f"{device}; move it there"
            )
        if values.dtype == self.dtype:
            return values.detach()
        if not (values.dtype.is_floating_point and self.dtype.is_floating_point):
            raise DataError(
                f"write({self.name}=...): the dtype is {values.dtype} instead of {self.dtype}; only floating-point "
                f"types are converted. Use .to({self.dtype})"
            )
        if self.dtype == torch.float16:
            values = values.clamp(-_HALF_MAX, _HALF_MAX)
        return values.detach().to(self.dtype)


class Packing:
    """The layout of a row: the tensors in the declared order, each little endian, without padding.

    Args:
        tensors: The shape and dtype of each tensor, by name.

    Raises ConfigError, which names the tensor, for a name that is not an identifier, a size that is not a positive
    integer, and a dtype that is not one of `DTYPES`.
    """

    def __init__(self, tensors: Mapping[str, Spec]):
        if not isinstance(tensors, Mapping) or not tensors:
            raise ConfigError("tensors: give a shape and a dtype by name, such as {'mean': ((10,), torch.float32)}")
        self.parts: dict[str, Part] = {}
        first = 0
        for name, spec in tensors.items():
            shape, dtype = _checked(name, spec)
            part = self.parts[name] = Part(name, shape, dtype, first)
            first = part.past
        self.row_bytes = first
        """Bytes per sample."""

    def describe(self) -> dict[str, Any]:
        """Each tensor's shape, dtype and first byte, as recorded with snapshots."""
        return {
            part.name: {"shape": list(part.shape), "dtype": str(part.dtype).removeprefix("torch."), "first": part.first}
            for part in self.parts.values()
        }

    def unpack(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors [n, *shape] of rows [n, row_bytes] uint8, as copies on the same device."""
        return {
            part.name: rows[:, part.first : part.past]
            .clone(memory_format=torch.contiguous_format)
            .view(part.dtype)
            .reshape(len(rows), *part.shape)
            for part in self.parts.values()
        }

    def pack(self, tensors: Mapping[str, torch.Tensor], before: torch.Tensor) -> torch.Tensor:
        """Rows [n, row_bytes] uint8 of the tensors [n, *shape]; one that is not given keeps its value in `before`.

        The result may share memory with the arguments. Raises DataError, which names the tensor.
        """
        if unknown := sorted(set(tensors) - set(self.parts)):
            raise DataError(f"write(): there is no tensor {', '.join(unknown)}; declared are {', '.join(self.parts)}")
        given = {name: self.parts[name].check(values, len(before), before.device) for name, values in tensors.items()}
        as_bytes = {
            name: values.reshape(len(before), -1).contiguous().view(torch.uint8) for name, values in given.items()
        }
        if len(as_bytes) == len(self.parts) == 1:
            return next(iter(as_bytes.values()))
        rows = torch.empty_like(before) if len(as_bytes) == len(self.parts) else before.clone()
        for name, values in as_bytes.items():
            rows[:, self.parts[name].first : self.parts[name].past] = values
        return rows


def _checked(name: str, spec: Spec) -> tuple[tuple[int, ...], torch.dtype]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"tensors: {name!r} is not a name; use letters, digits and _, because write() takes it")
    try:
        shape, dtype = spec
        sizes = tuple(shape)
    except (TypeError, ValueError):
        raise ConfigError(
            f"tensors[{name!r}]: {spec!r} is not a shape and a dtype, as ((10,), torch.float32)"
        ) from None
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(f"tensors[{name!r}]: the shape {list(sizes)} needs positive integers; a scalar has ()")
    if dtype not in DTYPES.values():
        raise ConfigError(f"tensors[{name!r}]: the dtype is {dtype!r}; choose one of torch.{', torch.'.join(DTYPES)}")
    return sizes, dtype
