"""Files that are there as they should be or not at all, also after a kill, a full disk or a power loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file by `write(file)`: durable, and it replaces an earlier one when it is complete. Raises OSError."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """An .npy file. Unlike numpy's own writer, a full disk is an OSError that says so."""
    rows = np.ascontiguousarray(array)

    def write(file: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
        file.write(rows.data)

    atomic_write(path, write)


def sync_directory(path: Path) -> None:
    """Let the names in a directory outlive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
