"""The contract of an object store: complete objects under keys, with atomic writes and conditional writes."""

from __future__ import annotations

import itertools
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from udddm.errors import StoreError
from udddm.storage.guard import Guard

T = TypeVar("T")

_TEMPORARY = ".partial"
_RESUME = "Checkpoints are intact; {remedy}, then run the same command again to resume"


@dataclass(frozen=True)
class Retry:
    """How failed requests are retried. Pauses double from the first to the longest, each multiplied by 0.5 to 1.5."""

    attempts: int = 4
    first_pause: float = 0.05  # seconds
    longest_pause: float = 1.0  # seconds
    longest_total: float = 300.0  # seconds since the first attempt, after which no other is started


REMOTE_RETRY = Retry(attempts=10, first_pause=0.1, longest_pause=20.0)
"""For requests over a network: up to 45 s of pauses, plus the time of the requests."""


class PermanentStorageError(Exception):
    """A failure that retrying does not fix. The text describes it; `remedy` is what to do, such as "make room"."""

    def __init__(self, what: str, remedy: str):
        self.remedy = remedy
        super().__init__(what)


class Oversized(ValueError):
    """An object is larger than allowed."""


class ObjectStore(ABC):
    """Base class of object stores. Keys are relative paths with `/`. A put is atomic: a reader sees the complete object
    or none.

    Implementations raise FileNotFoundError for a missing object, PermanentStorageError for a failure that only the user
    can fix, and OSError for one that a retry may resolve. Callers see FileNotFoundError and StoreError.
    """

    retry = Retry()

    def __init__(self) -> None:
        self.retries = 0
        self.guard = Guard()
        """Checked before each attempt to change an object."""
        self._closed = threading.Event()

    @abstractmethod
    def _get(self, key: str) -> bytes: ...

    @abstractmethod
    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None: ...

    @abstractmethod
    def _put_if_absent(self, key: str, data: bytes) -> bool: ...

    @abstractmethod
    def _compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool: ...

    @abstractmethod
    def _list(self, prefix: str) -> Sequence[str]: ...

    @abstractmethod
    def _delete(self, prefix: str) -> None: ...

    @abstractmethod
    def _sizes(self, prefix: str) -> dict[str, int]: ...

    def _upload(self, path: Path, key: str) -> None:
        self._put(key, (path.read_bytes(),))

    def _download(self, key: str, path: Path, most: int | None) -> None:
        data = self._get(key)
        if most is not None and len(data) > most:
            raise Oversized(f"it has {len(data)} bytes instead of {most}")
        path.write_bytes(data)

    @property
    def conditional(self) -> bool:
        """Whether `compare_and_swap` succeeds for only one of several clients on different machines."""
        return True

    @abstractmethod
    def uri(self, key: str) -> str:
        """The object's name in error messages; for the key "", the location of the store."""

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError at once, StoreError for other failures after bounded retries."""
        return self._retrying(f"read {self.uri(key)}", lambda: self._get(key))

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        """Write an object durably from consecutive parts. Raises StoreError after bounded retries."""
        self._changing(f"write {self.uri(key)}", lambda: self._put(key, parts))

    def upload(self, path: Path, key: str) -> None:
        """Write an object durably from a local file of any size. Raises OSError if it is unreadable, StoreError."""
        self._changing(f"write {self.uri(key)}", lambda: self._upload(path, key))

    def download(self, key: str, path: Path, most: int | None = None) -> None:
        """Write an object into a local file, at most `most` bytes.

        Raises FileNotFoundError, OSError if the file cannot be written, StoreError, and Oversized if the object has
        more than `most` bytes.
        """
        self._retrying(f"read {self.uri(key)}", lambda: self._download(key, path, most))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists. Of several clients, exactly one gets True. Raises StoreError.

        `data` must differ from that of any other client: after a lost reply, the bytes of the object tell who wrote it.
        """
        return self._changing(
            f"write {self.uri(key)}", lambda: self._put_if_absent(key, data) or self._holds(key, data)
        )

    def compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        """Replace an object that holds exactly `expected`. Of several clients, one gets True. Raises StoreError.

        No two contents of an object may be equal, as for `put_if_absent`.
        """
        return self._changing(
            f"write {self.uri(key)}", lambda: self._compare_and_swap(key, data, expected) or self._holds(key, data)
        )

    def list(self, prefix: str) -> Iterator[str]:
        """The names of objects and prefixes directly under `prefix`; empty if there is no such prefix.

        Includes everything that any client has written so far. Raises StoreError after bounded retries.
        """
        return iter(self._retrying(f"list {self.uri(prefix)}", lambda: self._list(prefix)))

    def delete(self, prefix: str) -> None:
        """Delete the object or everything under the prefix, if it exists. Raises StoreError."""
        self._changing(f"delete {self.uri(prefix)}", lambda: self._delete(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        """The size in bytes of every object under `prefix`, keyed by the rest of its key. Raises StoreError."""
        return self._retrying(f"list {self.uri(prefix)}", lambda: self._sizes(prefix))

    def sync(self) -> None:
        """Make the names of all objects written so far survive a power loss, if a put alone does not.

        Raises StoreError.
        """
        return

    def exists(self, key: str) -> bool:
        parent, _, name = key.rpartition("/")
        return name in self.list(parent)

    def close(self) -> None:
        """Stop retrying: requests that are waiting for their next attempt raise StoreError immediately."""
        self._closed.set()

    def _holds(self, key: str, data: bytes) -> bool:
        """Whether an earlier attempt succeeded although its reply was lost."""
        try:
            return self._get(key) == data
        except FileNotFoundError:
            return False

    def _changing(self, what: str, action: Callable[[], T]) -> T:
        def attempt() -> T:
            self.guard.wait()
            return action()

        return self._retrying(what, attempt)

    def _retrying(self, what: str, action: Callable[[], T]) -> T:
        retry, began = self.retry, time.monotonic()
        pause = retry.first_pause
        for attempt in itertools.count(1):
            try:
                return action()
            except FileNotFoundError:
                raise
            except PermanentStorageError as error:
                raise StoreError(f"cannot {what}: {error}. {_RESUME.format(remedy=error.remedy)}") from None
            except OSError as error:
                over = attempt >= retry.attempts or time.monotonic() - began > retry.longest_total
                if over or self._closed.is_set() or isinstance(error, PermissionError):
                    advice = _RESUME.format(remedy="make room or restore access")
                    raise StoreError(f"cannot {what}: {error} (tried {attempt} times). {advice}") from error
                self.retries += 1
                self._closed.wait(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, retry.longest_pause)
        raise AssertionError("unreachable")
