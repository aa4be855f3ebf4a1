"""Requests to stop a run: SIGTERM, SIGINT and SIGHUP."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEAT = 0.2
"""Seconds in which the same signal counts once. `timeout`, for example, signals a process and then its group."""


class StopRequest:
    """A signal handler that records the first signal and calls `on_first` with it.

    A second signal raises KeyboardInterrupt, whose argument is its number. With `once`, later signals are ignored: a
    launcher decides when its ranks stop immediately, and they may receive the same request from the launcher and from
    a job scheduler.
    """

    def __init__(self, on_first: Callable[[int], None] | None = None, *, once: bool = False):
        self.signum = 0
        """The signal, or 0."""
        self._on_first, self._once = on_first, once
        self._received = 0.0

    def __call__(self, signum: int, frame: FrameType | None = None) -> None:
        now = time.monotonic()
        if not self.signum:
            self.signum, self._received = signum, now
            if self._on_first is not None:
                self._on_first(signum)
        elif not self._once and (signum != self.signum or now - self._received >= REPEAT):
            raise KeyboardInterrupt(signum)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the stop signals with `handler`, and restore the previous handlers on exit.

    SIGHUP stays ignored if it is, as under `nohup`. Has no effect outside of the main thread, where the launcher
    handles the signals.
    """
    previous: dict[int, Any] = {}
    try:
        for signum in STOPPING:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            previous[signum] = signal.signal(signum, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            if before is not None:  # None: installed by a program in another language
                signal.signal(number, before)
