"""Messages to the user: the logger `udddm`.

The commands install a handler that prints to stderr. In a Python program, configure logging as usual; if no handler is
configured, `udddm.train` installs the same handler. To see only warnings and errors, also those of workers, call
`logging.getLogger("udddm").setLevel(logging.WARNING)`.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

log = logging.getLogger("udddm")

_LOCK = type(threading.RLock())


def tqdm() -> Any:
    """The class `tqdm.tqdm`, imported on first use, with a lock that a killed process cannot leave locked."""
    from tqdm import tqdm as bar

    if not isinstance(getattr(bar, "_lock", None), _LOCK):  # tqdm's default lock is shared between processes
        bar.set_lock(threading.RLock())
    return bar


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Log a warning unless this process has logged it before."""
    if text not in _warned:
        _warned.add(text)
        log.warning(text)


class Dispensable:
    """Output that training can do without, such as metrics or pictures of samples.

    A full disk, for example, is reported once, and training continues.
    """

    def __init__(self, what: str):
        self._what, self.failed = what, False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Turn the first OSError into a warning, and ignore the others."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                log.warning(f"cannot write {self._what}: {error}. Training continues without it")
            self.failed = True


class StderrHandler(logging.Handler):
    """Prints messages to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:  # closed before the start, for example by `2>&-`
            return
        with suppress(OSError, ValueError):  # the reader has exited: `2>&1 | head` must not end a run
            tqdm().write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


def install(*, force: bool = False, level: int = logging.INFO) -> None:
    """Print the messages of `udddm` to stderr, from `level` unless the logger already has a level.

    Without `force`, this does nothing if a handler already receives them, so that an application's logging
    configuration takes precedence.
    """
    if any(isinstance(each, StderrHandler) for each in log.handlers) or (log.hasHandlers() and not force):
        return
    log.addHandler(StderrHandler())
    log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(level)
