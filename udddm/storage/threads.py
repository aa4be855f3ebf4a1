"""Daemon threads, which do not keep the process alive."""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from udddm.errors import StoreError

T = TypeVar("T")

_abandoned: list[threading.Thread] = []
_owners: list[object] = []


def start_thread(body: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread that runs `body`. Raises StoreError if the system allows no further thread."""
    thread = threading.Thread(target=body, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise StoreError(
            f"cannot start the thread {name} ({error}): this user or container has too many threads. Raise the limit "
            "(ulimit -u, or pids of the container), then run the same command again"
        ) from error
    return thread


_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_arena() -> None:
    """Make the threads of this process that allocate memory from now on share one arena of malloc (glibc).

    By default each thread has another, which keeps what the thread has freed. The threads of a rank hand arrays of
    megabytes to each other, so that its memory would grow for as long as a run lasts. Does nothing with another C
    library, or if the environment sets MALLOC_ARENA_MAX or GLIBC_TUNABLES.
    """
    if sys.platform == "linux" and not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)


class Worker:
    """A thread that runs tasks one after another, in the order of submission.

    Unlike the thread of a ThreadPoolExecutor, it can be abandoned: if a task never returns, as when a data set hangs,
    `close` returns all the same, and the process can exit.
    """

    def __init__(self, name: str, prepare: Callable[[], None] | None = None):
        """`prepare` runs first in the thread, which starts with the first task."""
        self._name, self._prepare = name, prepare
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._pending: set[Future[Any]] = set()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Queue a task. Raises StoreError if the thread cannot start."""
        if self._thread is None:
            self._thread = start_thread(self._run, self._name)
        future: Future[T] = Future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._tasks.put((future, task))
        return future

    def close(self, patience: float) -> None:
        """Cancel the tasks that have not started, and wait up to `patience` seconds for the one that has."""
        for future in list(self._pending):
            future.cancel()
        self._tasks.put(None)
        if self._thread is not None:
            self._thread.join(patience)
            if self._thread.is_alive():
                _abandoned.append(self._thread)

    def _run(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while (item := self._tasks.get()) is not None:
            future, task = item
            del item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)
            del future, task  # they may keep images alive until the next task


def abandon(owners: Iterable[object]) -> None:
    """Make `abandoned` true from now on, because the threads of these objects of another library may never end.

    The objects are kept, because their destructors would wait for the threads.
    """
    _owners.extend(owners)


def abandoned() -> bool:
    """Whether a worker was closed while its task was running, and still is, or `abandon` was called.

    The process should then end with `os._exit`: a thread that leaves PyTorch's code while the interpreter shuts down
    aborts the process, and the interpreter waits for those of a process group.
    """
    return bool(_owners) or any(thread.is_alive() for thread in _abandoned)
