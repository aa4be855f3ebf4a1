"""Durable and atomic writes: after a kill, a full disk or a power loss, a file is complete or does not exist.

Also expands paths given by users. NumPy and safetensors are imported only where needed, because the configuration uses
this module.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from udddm.errors import CheckpointError, ConfigError, Unreadable

if TYPE_CHECKING:
    import numpy.typing as npt

T = TypeVar("T")


@contextmanager
def complete_file(temporary: Path, save: Callable[[Path], object]) -> Iterator[Path]:
    """Write a file with `save(temporary)`, sync it, and yield its path. On exit it is removed unless it was renamed.

    An OSError names the file, which those of a write or a sync do not by themselves.
    """
    try:
        save(temporary)
        sync_file(temporary)
        yield temporary
    except OSError as error:
        error.filename = error.filename or str(temporary)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_save(path: Path, save: Callable[[Path], object], *, shared: bool = False) -> None:
    """Write a file durably with `save(temporary path)`. Once complete, it replaces an existing file atomically.

    Set `shared` if other processes may write the same file at the same time. Raises OSError.
    """
    name = f"{path.name}.{os.urandom(16).hex()}.partial" if shared else f"{path.name}.partial"
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
    """Write an .npy file durably and atomically.

    On a full disk the OSError states the reason, unlike that of NumPy's own writer.
    """
    import numpy as np

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
    """Sync the names in a directory to disk, so that they survive a power loss.

    Some network file systems cannot do this, which is logged once.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EINVAL):
            raise
        from udddm.log import warn_once  # here, because every command imports this module

        warn_once(f"the file system of {path} cannot sync directories: a power loss may lose the newest files")
    finally:
        os.close(descriptor)


UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that lacks an operation."""


def lock_file(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file exclusively until it is closed. Returns False on a file system without locks.

    Raises BlockingIOError if another process holds the lock, unless `wait` is set.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.ENOLCK):
            raise
        return False
    return True


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
    from safetensors import SafetensorError

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


_ONE_SLASH = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]+:)/(?!/)(.*)|((?:s3|gs|gcs|az|abfs|hdfs|https?|memory):)(?!/)(.*)", re.DOTALL
)


def expanded(path: str | Path) -> Path:
    """A path with `~` replaced by the home directory. Shells do not expand it in `--run-dir=~/run`.

    Raises ConfigError if there is no home directory, and for a URL, including a URL that lost its slashes: `pathlib`
    turns s3://bucket into s3:/bucket.
    """
    text = str(path)
    if "://" in text and not isinstance(path, Path):
        raise ConfigError(f"{text}: this must be a local path, not a URL")
    if match := _ONE_SLASH.fullmatch(text):
        scheme, rest = match[1] or match[3], match[2] or match[4]
        raise ConfigError(
            f"{text}: write two slashes after the scheme, as in {scheme}//{rest}, and pass URLs as text, not as "
            f"Path; for a directory of that name, write ./{text}"
        )
    if not text.startswith("~"):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{text}: ~ cannot be expanded, because there is no such home directory: set HOME, or write the full path"
        ) from error


def home_cache() -> Path:
    """The cache directory: ~/.cache/udddm, or a temporary directory of this user if the home directory is missing or
    not writable, as in a container with a random user ID.

    Raises ConfigError if that directory belongs to another user.
    """
    try:
        found = Path.home() / ".cache" / "udddm"
        nearest = next(place for place in (found, *found.parents) if place.exists())
        if os.access(nearest, os.W_OK):
            return found
    except (RuntimeError, OSError):
        pass
    import tempfile  # here, because every command imports this module

    found = Path(tempfile.gettempdir()) / f"udddm-{os.getuid()}"
    found.mkdir(mode=0o700, exist_ok=True)
    if found.is_symlink() or found.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{found} belongs to another user: set HOME, or set TMPDIR to a directory that belongs to you"
        )
    return found
