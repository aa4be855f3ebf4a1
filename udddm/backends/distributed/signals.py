"""Handling of SIGTERM and SIGINT during a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle both signals with `handler`, and restore the previous handlers on exit.

    Has no effect outside of the main thread, where the launcher handles the signals.
    """
    previous: dict[int, Any] = {}
    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            previous[signum] = signal.signal(signum, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
