"""Implements `store.on_corruption=reinitialize`: the samples of a corrupt chunk are reset to generation 0."""

from __future__ import annotations

import threading

from udddm.errors import CorruptChunkError
from udddm.log import log
from udddm.store.base import StoreCounters


class Repair:
    """Counts the samples of corrupt chunks in `counters.reinitialized`, each chunk once, and logs a warning."""

    def __init__(self, counters: StoreCounters):
        self.counters = counters
        self._seen: set[tuple[int, int, int]] = set()
        self._lock = threading.Lock()

    def __call__(self, error: CorruptChunkError, samples: int) -> None:
        with self._lock:
            key = (error.generation, error.lane, error.chunk)
            if key in self._seen:
                return
            self._seen.add(key)
            self.counters.reinitialized += samples
        log.warning("%s: the %d samples of this chunk restart from generation 0", error.what, samples)
