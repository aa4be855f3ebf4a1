"""Files that are there as they should be or not at all, also after a kill, a full disk or a power loss."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from udddm.errors import CheckpointError, Unreadable

T = TypeVar("T")


@contextmanager
def complete_file(temporary: Path, save: Callable[[Path], object]) -> Iterator[Path]:
    """Write a file with `save(temporary)`, sync it, and yield its path. On exit it is removed unless it was renamed."""
    try:
        save(temporary)
        sync_file(temporary)
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_save(path: Path, save: Callable[[Path], object], *, shared: bool = False) -> None:
    """Write a file durably with `save(temporary path)`. Once complete, it replaces an existing file atomically.

    Set `shared` if other processes may write the same file at the same time. Raises OSError.
    """
    name = f"{path.name}.{uuid.uuid4().hex}.partial" if shared else f"{path.name}.partial"
    with complete_file(path.with_name(name), save) as temporary:
        temporary.replace(path)
    sync_directory(path.parent)


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, shared: bool = False) -> None:
    """`atomic_save` with `write(open binary file)`. Raises OSError."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    atomic_save(path, save, shared=shared)


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """An .npy file. Unlike numpy's own writer, a full disk is an OSError that says so."""
    rows = np.ascontiguousarray(array)

    def write(file: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
        file.write(rows.data)

    atomic_write(path, write)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, durably. Does nothing if it exists. Raises OSError."""
    path = path.absolute()
    created = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in reversed(created):
        sync_directory(each.parent)


def sync_directory(path: Path) -> None:
    """Sync the names in a directory to disk, so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_PAUSES = (0.2, 1.0, 3.0)
"""Seconds between attempts to read a file."""


def sync_file(path: Path) -> None:
    """Sync the contents of a file to disk, so that they survive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, durably and atomically. Raises OSError."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, durably and atomically. Raises OSError."""
    atomic_write(path, lambda file: file.write(text.encode()))


def read_patiently(path: Path, action: Callable[[], T]) -> T:
    """The result of `action`, which reads something under `path`. Retried a few times after an OSError.

    Raises Unreadable if the last attempt fails.
    """
    for pause in (*_PAUSES, None):
        try:
            return action()
        except OSError as error:
            if pause is None:
                raise Unreadable(
                    f"cannot read {path}: {error}. The file may be intact, and nothing was removed. Restore access to "
                    "it, then run the same command again"
                ) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except RecursionError:
        raise CheckpointError(f"cannot read {path}: it is nested too deeply") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def load_json(path: Path, *keys: str) -> Any:
    """The contents of a JSON file. With `keys`, it must hold a mapping that has all of them. Raises CheckpointError."""
    with _explained(path):
        found = json.loads(path.read_text())
        if keys and not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a mapping")
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return found
