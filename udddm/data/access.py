"""Bytes of files on a local disk or at any fsspec URL: entire files, and ranges of them."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from udddm.errors import DataError

T = TypeVar("T")

OPEN_FILES = 64
"""Local files that a reader keeps open."""
ATTEMPTS = 5
"""Attempts of a request to a remote file system."""
_RANGES = "support range requests"
"""A part of the message of fsspec's HTTP file system."""
LISTED = 20_000_000
"""Files that a folder at a URL may have."""


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file has changed."""

    size: int
    """Bytes."""
    tag: str
    """Modification time in nanoseconds, or what the remote file system has: ETag, checksum or time. May be ""."""


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a local path. file:// must have been removed before."""
    return "://" in place or "::" in place


class _Handle:
    """An open local file. It is closed when nothing refers to it, so that a reader in another thread can finish."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class RangeReader:
    """Reads ranges of files, local or remote.

    Thread-safe, also after a fork, because local reads do not use the position of a file. A copy in another process
    opens the files again.
    """

    def __init__(self) -> None:
        self._handles: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RangeReader.__init__(self)

    def read(self, place: str, start: int, length: int) -> bytes:
        """Returns `length` bytes from the byte `start`. Raises DataError, also if the file ends before."""
        if is_url(place):
            data = asking(place, lambda fs, path: bytes(fs.cat_file(path, start=start, end=start + length)))
        else:
            try:
                data = self._local(place, start, length)
            except OSError as error:
                raise DataError(f"cannot read {place}: {error.strerror}") from error
        if len(data) > length:
            raise without_ranges(place)
        if len(data) < length:
            raise DataError(
                f"{place} has {len(data)} bytes at {start} instead of {length}: it is truncated or was replaced"
            )
        return data

    def _local(self, path: str, start: int, length: int) -> bytes:
        with self._lock:
            handle = self._handles.get(path) or _Handle(path)
            self._handles[path] = handle
            self._handles.move_to_end(path)
            if len(self._handles) > OPEN_FILES:
                self._handles.popitem(last=False)
        data = os.pread(handle.descriptor, length, start)
        while len(data) < length:  # a read of more than 2 GiB, or of some network file systems, returns less
            more = os.pread(handle.descriptor, length - len(data), start + len(data))
            if not more:
                break
            data += more
        return data


def stamp(place: str) -> Stamp:
    """The size and version of a file. Raises DataError if there is none."""
    if not is_url(place):
        try:
            found = Path(place).stat()
        except OSError as error:
            raise DataError(f"cannot read {place}: {error.strerror}") from error
        return Stamp(found.st_size, str(found.st_mtime_ns))
    info = asking(place, lambda fs, path: dict(fs.info(path)))
    if info.get("size") is None:
        raise DataError(f"the server of {place} does not state its size: copy it to a local disk")
    names = ("ETag", "etag", "md5", "crc32c", "mtime", "LastModified", "last_modified", "Last-Modified", "created")
    return Stamp(int(info["size"]), next((str(info[name]) for name in names if info.get(name)), ""))


def read_start(url: str, most: int) -> bytes:
    """The first `most` bytes of the file at a URL, or all of it, in one request. Raises DataError."""
    return asking(url, lambda fs, path: bytes(fs.cat_file(path, start=0, end=most)))[:most]


def read_all(place: str, most: int) -> bytes:
    """The contents of a file of at most `most` bytes. Raises DataError."""
    size = stamp(place).size
    if size > most:
        raise DataError(f"{place} has {size} bytes, more than the limit of {most}")
    return RangeReader().read(place, 0, size)


def open_sequential(place: str) -> IO[bytes]:
    """A file to read from start to end, with seeks. Raises DataError."""
    if not is_url(place):
        try:
            return Path(place).open("rb")
        except OSError as error:
            raise DataError(f"cannot read {place}: {error.strerror}") from error
    opened: IO[bytes] = asking(place, lambda fs, path: fs.open(path, "rb"))
    return opened


def is_directory(place: str) -> bool:
    """Whether a URL is a directory or prefix. Raises DataError."""
    return bool(asking(place, lambda fs, path: fs.isdir(path)))


def find(place: str) -> list[str]:
    """The names of all files below a URL, relative to it, with `/`. Raises DataError."""

    def names(fs: Any, path: str) -> list[str]:
        root = path.rstrip("/")
        inside = []
        for found in fs.find(path):
            name = str(found)
            if name.lstrip("/").startswith(root.lstrip("/") + "/"):  # a web page may link to other places
                inside.append(name.lstrip("/")[len(root.lstrip("/")) + 1 :])
            if len(inside) > LISTED:
                raise DataError(f"{place} has more than {LISTED} files: pack them into shards (docs/data.md)")
        return inside

    return asking(place, names)


def failed(place: str, kind: str, error: Exception) -> DataError:
    """The error for a failure while a file is read as `kind`, such as "a ZIP archive"."""
    if _RANGES in str(error):
        return without_ranges(place)
    return DataError(f"cannot read {place} as {kind}: {error}. Copy it again")


def without_ranges(place: str) -> DataError:
    """The error for a web server that only sends entire files."""
    return DataError(f"the server of {place} does not support range requests: download the file")


def asking(place: str, request: Callable[[Any, str], T]) -> T:
    """The result of `request(file system, path)` for a URL, retried after transient failures. Raises DataError.

    The errors are those of `udddm.storage.failures`, because the messages of the libraries differ and may show secrets.
    """
    from fsspec.core import url_to_fs

    from udddm.storage.base import PermanentStorageError
    from udddm.storage.failures import of_fsspec

    try:
        fs, path = url_to_fs(place)
    except ImportError as error:
        raise DataError(f"{place}: {error}. For s3:// that is: pip install 'udddm[s3]'") from error
    except Exception as error:  # the errors differ between file systems
        raise DataError(f"{place} is not a URL that fsspec can open ({type(error).__name__})") from error
    pause = 0.1
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request(fs, path)
        except DataError:
            raise
        except Exception as error:  # the errors differ between file systems
            if _RANGES in str(error):
                raise without_ranges(place) from error
            failure = of_fsspec(error)
            if isinstance(failure, FileNotFoundError):
                raise DataError(f"nothing exists at {place}") from error
            if isinstance(failure, PermanentStorageError) or attempt == ATTEMPTS:
                raise DataError(f"cannot read {place}: {failure}") from error
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause *= 2
    raise AssertionError("unreachable")
