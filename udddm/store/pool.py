"""A thread pool that starts tasks in the order of submission, with a limit that may change while they run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from udddm.errors import StoreError
from udddm.storage.threads import start_thread


class Pool:
    """Runs at most `limit` tasks at once. A task starts only after all tasks submitted before it have started.

    Tasks must not raise. Threads are created on demand and stay idle when the limit is lowered.
    """

    def __init__(self, name: str, limit: int):
        self._name, self._limit = name, limit
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._closed = False

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        if value == self._limit:
            return
        with self._changed:
            self._limit = value
            self._employ()

    def submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Raises StoreError if not a single thread can start."""
        with self._changed:
            if not self._closed:
                self._tasks.append(partial(task, *arguments))
                self._employ()

    def shutdown(self) -> None:
        """Discard the tasks that have not started and wait for those that have."""
        with self._changed:
            self._closed = True
            self._tasks.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _employ(self) -> None:
        wanted = min(self._limit, self._running + len(self._tasks))
        while len(self._threads) < wanted:
            try:
                self._threads.append(start_thread(self._work, f"{self._name}-{len(self._threads)}"))
            except StoreError:
                if not self._threads:
                    raise
                break  # with fewer threads
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._tasks or self._running >= self._limit):
                    self._changed.wait()
                if self._closed:
                    return
                task = self._tasks.popleft()
                self._running += 1
            try:
                task()
            finally:
                del task  # it may keep a window's memory alive
                with self._changed:
                    self._running -= 1
                    if self._tasks:
                        self._changed.notify_all()
