"""Threads that may be abandoned, and a system that allows no further thread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from typing import Any

import pytest

from udddm.errors import StoreError
from udddm.storage import threads
from udddm.storage.threads import Worker
from udddm.store.pool import Pool


def test_tasks_run_in_order_and_their_errors_are_returned() -> None:
    worker, done = Worker("test"), []
    futures = [worker.submit(lambda i=i: done.append(i) or i) for i in range(20)]  # type: ignore[misc,func-returns-value]
    failed = worker.submit(lambda: 1 // 0)
    assert [future.result(10) for future in futures] == done == list(range(20))
    with pytest.raises(ZeroDivisionError):
        failed.result(10)
    worker.close(10)
    assert not threads.abandoned()


def test_closing_cancels_waiting_tasks_and_abandons_one_that_does_not_return() -> None:
    worker, gate, begun = Worker("test"), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    worker.submit(hang)
    waiting = worker.submit(lambda: None)
    begun.wait(10)
    worker.close(0.01)
    assert waiting.cancelled() and threads.abandoned()
    gate.set()
    for thread in threads._abandoned:
        thread.join(10)
    assert not threads.abandoned()


class Limit:
    """The system starts only this many further threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int):
        self.left, self.start = left, threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self._start(thread))

    def _start(self, thread: Any) -> None:
        if not self.left:
            raise RuntimeError("can't start new thread")
        self.left -= 1
        self.start(thread)


def test_a_limit_of_threads_is_one_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("reading", 4)
    Limit(monkeypatch, 0)
    with pytest.raises(StoreError, match=r"cannot start the thread reading-0 \(can't start new thread\).*ulimit -u"):
        pool.submit(lambda: None)
    pool.shutdown()


def test_a_pool_continues_with_the_threads_that_could_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, done = Pool("reading", 4), threading.Semaphore(0)
    Limit(monkeypatch, 1)
    for _ in range(8):
        pool.submit(done.release)
    for _ in range(8):
        assert done.acquire(timeout=10)
    pool.shutdown()


ARENAS = """
import ctypes, os, sys, threading
from udddm.storage.threads import share_arena

if sys.argv[1] == "shared":
    share_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
met = threading.Barrier(5)

def allocate():
    for size in (100, 10_000, 100_000):
        libc.malloc(size)
    met.wait()

for _ in range(4):
    threading.Thread(target=allocate).start()
met.wait()
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no arenas")
@pytest.mark.parametrize(
    ("how", "variables", "one"),
    [("shared", {}, True), ("as it is", {}, False), ("shared", {"MALLOC_ARENA_MAX": "3"}, False)],
)
def test_threads_share_an_arena_unless_the_environment_says_otherwise(
    how: str, variables: dict[str, str], one: bool
) -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", ARENAS, how], env=inherited | variables, capture_output=True, text=True, check=True
    )
    assert (done.stdout.count("<heap nr=") == 1) == one, done.stdout
