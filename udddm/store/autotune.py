"""Chooses the pipeline's number of concurrent requests, windows and prefetched batches from its own measurements.

Reading and writing have to keep up with the training steps, without more threads or memory than necessary:

    requests per second, each way   lanes x samples per lane and step / (samples per chunk x seconds per step)
    concurrent requests             that rate x seconds per request (Little's law), plus 50 percent
    windows ahead                   as many as are used up while one is read, and while one is written
    batches ahead                   the steps that run during a hiccup: a slow request, or a switch between threads

The order of visits depends on none of these. `order.chunk` and `order.window` determine the result, so they are never
adjusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from udddm.config import StoreConfig
from udddm.errors import StoreError
from udddm.order import Order

FEWEST, MOST = 2, 32
"""Least and most concurrent requests, each way."""
DEFAULT_MEMORY = 1 << 30
"""Bytes of windows and batches, unless the least that works is more."""
_SPARE = 1.5
_HICCUP = 0.05  # seconds
_DEPTHS = 4, 64


class Smoothed:
    """Running mean and mean deviation, weighted toward recent values, as RFC 6298 estimates a round-trip time."""

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self.known = False

    def add(self, value: float) -> None:
        if not self.known:
            self.mean, self.deviation, self.known = value, value / 2, True
            return
        self.deviation += (abs(value - self.mean) - self.deviation) / 4
        self.mean += (value - self.mean) / 8

    @property
    def slow(self) -> float:
        """An upper estimate that few values exceed."""
        return self.mean + 4 * self.deviation


@dataclass(frozen=True)
class Limits:
    """Values fixed by the user; those that are None are chosen automatically."""

    threads: int | None = None
    """Concurrent read requests, and as many write requests."""
    prefetch: int | None = None
    """Batches that are prepared ahead of the step."""
    memory: int | None = None
    """Bytes of one rank's windows and batches."""
    first_threads: int = FEWEST
    """Concurrent requests until enough has been measured."""

    @classmethod
    def of(cls, config: StoreConfig, first_threads: int = FEWEST) -> Limits:
        """The limits that a configuration sets."""
        memory = None if config.memory_mb is None else config.memory_mb * 10**6
        return cls(config.threads, config.prefetch, memory, first_threads)


@dataclass
class Autotune:
    """Chooses the pipeline's sizes for one rank's `lanes` of an `order` with rows of `row_bytes` bytes.

    The seconds of a step exclude the time it waited for the store. Raises StoreError if `limits.memory` is less than
    the least that works.
    """

    order: Order
    lanes: range
    row_bytes: int
    limits: Limits = Limits()
    step: Smoothed = field(default_factory=Smoothed)
    load: Smoothed = field(default_factory=Smoothed)
    save: Smoothed = field(default_factory=Smoothed)

    def __post_init__(self) -> None:
        order = self.order
        smallest = min(order.smallest_window(lane) for lane in self.lanes)
        self._fewest_windows = 2 + -(-order.samples_per_lane_step // smallest)
        largest = min(order.chunks_per_window * order.chunk_size, order.longest_lane)
        window, batch = (
            len(self.lanes) * largest * self.row_bytes,
            len(self.lanes) * order.samples_per_lane_step * self.row_bytes,
        )
        least = self._fewest_windows * window + 2 * (self.limits.prefetch or 1) * batch
        if self.limits.memory is not None and self.limits.memory < least:
            raise StoreError(
                f"store.memory_mb: {self._fewest_windows} windows of {len(self.lanes)} lanes and their batches take "
                f"{math.ceil(least / 1e6)} MB: allow that much, or spread the lanes over more ranks"
            )
        budget = max(least, self.limits.memory or DEFAULT_MEMORY)
        for_batches = max(2 * batch, min(budget // 8, budget - self._fewest_windows * window))
        self._most_depth = min(_DEPTHS[1], for_batches // (2 * batch))
        self._most_windows = max(self._fewest_windows, (budget - for_batches) // window)
        self._most_threads = max(FEWEST, min(MOST, budget // 4 // (order.chunk_size * self.row_bytes)))
        self.update()

    def update(self) -> None:
        """Choose again from the current measurements."""
        self.readers = self.writers = self.limits.threads or min(self.limits.first_threads, self._most_threads)
        self.ahead, self.windows = 1, self._fewest_windows
        self.depth = self.limits.prefetch or max(1, min(_DEPTHS[0], self._most_depth))
        if not self.step.known or self.step.mean <= 0:
            return
        order = self.order
        rate = len(self.lanes) * order.samples_per_lane_step / order.chunk_size / self.step.mean
        in_use = (
            order.chunks_per_window * order.chunk_size / order.samples_per_lane_step * self.step.mean
        )  # a window's seconds
        if self.limits.threads is None:
            if self.load.known:
                self.readers = self._within(_SPARE * rate * self.load.mean)
            if self.save.known:
                self.writers = self._within(_SPARE * rate * self.save.mean)
        chunks = len(self.lanes) * order.chunks_per_window  # all lanes change windows together
        reading = -(-chunks // self.readers) * self.load.mean + 4 * self.load.deviation
        writing = -(-chunks // self.writers) * self.save.mean + 4 * self.save.deviation
        room = self._most_windows - self._fewest_windows
        more_ahead = min(room, max(0, math.ceil(reading / in_use) - 1))
        more_behind = min(room - more_ahead, max(0, math.ceil(writing / in_use) - 1))
        self.ahead = 1 + more_ahead
        self.windows = self._fewest_windows + more_ahead + more_behind
        if self.limits.prefetch is None:
            wanted = math.ceil(max(_HICCUP, self.load.slow if self.load.known else 0.0) / self.step.mean)
            self.depth = max(1, min(max(wanted, _DEPTHS[0]), self._most_depth))

    def _within(self, wanted: float) -> int:
        return max(FEWEST, min(self._most_threads, math.ceil(wanted)))
