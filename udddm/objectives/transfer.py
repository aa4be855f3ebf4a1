"""Tensors that go to a GPU together: packed in one piece of page-locked memory, one copy takes them all.

A step has a dozen small inputs. Each copy costs the host as much as a kernel, and the GPU a pause.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch

T = TypeVar("T")
ALIGNMENT = 64
"""Bytes. Kernels read aligned tensors in larger parts."""


def map_tensors(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """`value`, a tensor or a dataclass, with every tensor in it, also in dataclasses in it, replaced by what `change`
    returns for it. They are visited in the order of the fields."""
    made: Any = value
    if isinstance(value, torch.Tensor):
        made = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        made = replace(value, **{each.name: map_tensors(getattr(value, each.name), change) for each in fields(value)})
    return cast(T, made)


def _aligned(size: int) -> int:
    """The bytes that a tensor of `size` bytes takes."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


class Packed(Generic[T]):
    """A copy of a dataclass whose tensors share one piece of host memory.

    `pin` makes the memory page-locked, so that `to` does not wait for the copy.
    """

    def __init__(self, value: T, *, pin: bool):
        sizes: list[int] = []

        def measure(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(_aligned(tensor.nbytes))
            return tensor

        map_tensors(value, measure)
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pin)
        self._value = self._placed(value, self._memory, fill=True)

    def to(self, device: torch.device) -> T:
        """The value on `device`."""
        return self._placed(self._value, self._memory.to(device, non_blocking=True), fill=False)

    @staticmethod
    def _placed(value: T, memory: torch.Tensor, *, fill: bool) -> T:
        """`value` with its tensors in `memory`, one after the other. `fill` copies their values there."""
        first = 0

        def place(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal first
            there = memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            first += _aligned(tensor.nbytes)
            return there.copy_(tensor) if fill else there

        return map_tensors(value, place)
