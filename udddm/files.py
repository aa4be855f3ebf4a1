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
    """The file that `save(temporary)` writes, complete and synced; removed in the end unless it was renamed."""
    try:
        save(temporary)
        sync_file(temporary)
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_save(path: Path, save: Callable[[Path], object], *, shared: bool = False) -> None:
    """Write a file by `save(temporary path)`: durable, and it replaces an earlier one when it is complete.

    `shared`: other processes may write the same file at the same time. Raises OSError.
    """
    name = f"{path.name}.{uuid.uuid4().hex}.partial" if shared else f"{path.name}.partial"
    with complete_file(path.with_name(name), save) as temporary:
        temporary.replace(path)
    sync_directory(path.parent)


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, shared: bool = False) -> None:
    """`atomic_save` by `write(open file)`."""

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
    """Create a directory and the parents that it lacks, if it does not exist; their names outlive a power loss."""
    path = path.absolute()
    created = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in reversed(created):
        sync_directory(each.parent)


def sync_directory(path: Path) -> None:
    """Let the names in a directory outlive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_PAUSES = (0.2, 1.0, 3.0)
"""Seconds between attempts to read what cannot be read."""


def sync_file(path: Path) -> None:
    """Let the contents of a file outlive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write durably and atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write durably and atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def read_patiently(path: Path, action: Callable[[], T]) -> T:
    """The result of reading something under `path`, at one of a few attempts. Raises Unreadable."""
    for pause in (*_PAUSES, None):
        try:
            return action()
        except OSError as error:
            if pause is None:
                raise Unreadable(
                    f"cannot read {path}: {error}. It need not be damaged, and nothing was removed: restore access to "
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
    """What a JSON file holds; with `keys`, a mapping that has them. Raises CheckpointError."""
    with _explained(path):
        found = json.loads(path.read_text())
        if keys and not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a mapping")
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return found
