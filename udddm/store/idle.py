"""The time in which the device had nothing to do while a training step waited on the host.

On a GPU, the host runs ahead of the device. It may wait while the device still works on earlier steps, which costs
nothing: what counts is the part of a wait after the device finished all the work that it had been given.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Protocol, Self

import torch


class Mark(Protocol):
    """A point in the sequence of the work that was given to a device."""

    def passed(self) -> bool:
        """Whether the device has done all work before this point. Does not wait."""

    def seconds_until(self, later: Self) -> float:
        """The time between the moments at which the device passed this mark and a later one. Both have passed."""


class Idle(ABC):
    """Measures waits of one thread: `begin` before each, and `end` after it."""

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    @property
    @abstractmethod
    def seconds(self) -> float:
        """The time without work in all waits so far."""


class HostIdle(Idle):
    """For a CPU, which does no work while it waits: the duration of the waits."""

    def __init__(self) -> None:
        self._began = self._known = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self._known += time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        return self._known


class DeviceIdle(Idle):
    """For a device that works on while the host waits. `mark` places a mark after all work that was given to it.

    Each wait has a mark at its beginning and one at its end, with no work in between: the device was idle from the one
    to the other. If it was busy throughout, it passes both at once, later. They are evaluated when it has passed them,
    so that nothing waits for the device.
    """

    def __init__(self, mark: Callable[[], Mark], clock: Callable[[], float] = time.perf_counter):
        self._mark, self._clock = mark, clock
        self._first, self._began = mark(), 0.0
        self._ended: deque[tuple[Mark, Mark, float]] = deque()
        self._known = 0.0

    def begin(self) -> None:
        self._first, self._began = self._mark(), self._clock()

    def end(self) -> None:
        self._ended.append((self._first, self._mark(), self._clock() - self._began))

    @property
    def seconds(self) -> float:
        while self._ended and self._ended[0][1].passed():
            first, last, waited = self._ended.popleft()
            self._known += min(first.seconds_until(last), waited)
        return self._known


class CudaMark:
    """An event on the current stream of a GPU."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def passed(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def seconds_until(self, later: Self) -> float:
        return float(self._event.elapsed_time(later._event)) / 1000


def idle_of(device: torch.device) -> Idle:
    """Measures the waits for a device."""
    return DeviceIdle(lambda: CudaMark(device)) if device.type == "cuda" else HostIdle()
