"""TODO."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

_LOCK = type(threading.RLock())


def _tqdm() -> Any:
    from tqdm import tqdm

    if not isinstance(getattr(tqdm, "_lock", None), _LOCK):  # its own is shared between processes, and lost by a kill
        tqdm.set_lock(threading.RLock())
    return tqdm


def say(text: str) -> None:
    """One line to the person who runs this, if anybody still reads: `2>&1 | head` must not end a run."""
    if sys.stderr is None:  # closed before the start, as by `2>&-`
        return
    with suppress(OSError, ValueError):
        _tqdm().write(text, file=sys.stderr)
        sys.stderr.flush()
