"""Whole objects under keys: the little that the store asks of a place that keeps bytes."""

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
_RESUME = "The last checkpoint is intact; {cure}, then run the same command again to resume"


@dataclass(frozen=True)
class Retry:
    """How often a failed request is made again. Pauses double from the first to the longest, each times 0.5 to 1.5."""

    attempts: int = 4
    first_pause: float = 0.05  # seconds
    longest_pause: float = 1.0  # seconds
    longest_total: float = 300.0  # seconds from the first attempt, after which no other is begun


REMOTE_RETRY = Retry(attempts=10, first_pause=0.1, longest_pause=20.0)
"""Of requests over a network: 45 s of pauses, and the requests' own time."""


class PermanentStorageError(Exception):
    """A failure that no repetition cures. The text says what it is; `cure` what to do, as in "make room"."""

    def __init__(self, what: str, cure: str):
        self.cure = cure
        super().__init__(what)


class Oversized(ValueError):
    """An object is larger than it may be."""


class ObjectStore(ABC):
    """Keys are relative paths with `/`. A put is atomic: a reader sees the whole object or none.

    Implementations raise FileNotFoundError for a missing object, Refused for what only the user can mend, and OSError
    for what another attempt may cure. Callers see FileNotFoundError and StoreError.
    """

    retry = Retry()
    conditional = True
    """Whether `compare_and_swap` has one winner among clients on several machines."""

    def __init__(self) -> None:
        self.retries = 0
        self.guard = Guard()
        """Asked before each attempt to change something."""
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

    @abstractmethod
    def uri(self, key: str) -> str:
        """What an error message calls the object; of the key "", where all of them are."""

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError at once, StoreError after bounded retries of anything else."""
        return self._retrying(f"read {self.uri(key)}", lambda: self._get(key))

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        """Write an object, durably, from consecutive parts. Raises StoreError after bounded retries."""
        self._changing(f"write {self.uri(key)}", lambda: self._put(key, parts))

    def upload(self, path: Path, key: str) -> None:
        """Write an object from a local file, of any size, durably. Raises OSError of the file, StoreError."""
        self._changing(f"write {self.uri(key)}", lambda: self._upload(path, key))

    def download(self, key: str, path: Path, most: int | None = None) -> None:
        """Write an object into a local file. Raises FileNotFoundError, OSError of the file, StoreError; Oversized for
        an object of more than `most` bytes, of which no more is written."""
        self._retrying(f"read {self.uri(key)}", lambda: self._download(key, path, most))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; of several clients one gets True. Raises StoreError.

        `data` has to be unlike any other client's: whose object is there after a lost reply is seen from its bytes.
        """
        return self._changing(
            f"write {self.uri(key)}", lambda: self._put_if_absent(key, data) or self._holds(key, data)
        )

    def compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        """Replace an object that holds exactly `expected`; of several clients one gets True. Raises StoreError.

        No two contents of an object may be the same, as for `put_if_absent`.
        """
        return self._changing(
            f"write {self.uri(key)}", lambda: self._compare_and_swap(key, data, expected) or self._holds(key, data)
        )

    def list(self, prefix: str) -> Iterator[str]:
        """The names directly under `prefix`, objects and prefixes alike; none when there is no such prefix.

        Shows what every client has written until now. Raises StoreError after bounded retries.
        """
        return iter(self._retrying(f"list {self.uri(prefix)}", lambda: self._list(prefix)))

    def delete(self, prefix: str) -> None:
        """Remove the object or everything under the prefix; nothing happens when there is none. Raises StoreError."""
        self._changing(f"delete {self.uri(prefix)}", lambda: self._delete(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        """The bytes of every object under `prefix`, by the rest of its key. Raises StoreError."""
        return self._retrying(f"list {self.uri(prefix)}", lambda: self._sizes(prefix))

    def sync(self) -> None:
        """Let the names of all that was put outlive a power loss, where a put alone does not do that.

        Raises StoreError.
        """
        return

    def exists(self, key: str) -> bool:
        parent, _, name = key.rpartition("/")
        return name in self.list(parent)

    def close(self) -> None:
        """Make no more attempts: requests that are waiting for their next one raise StoreError now."""
        self._closed.set()

    def _holds(self, key: str, data: bytes) -> bool:
        """Whether an earlier attempt got through although its reply did not."""
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
                raise StoreError(f"cannot {what}: {error}. {_RESUME.format(cure=error.cure)}") from None
            except OSError as error:
                over = attempt >= retry.attempts or time.monotonic() - began > retry.longest_total
                if over or self._closed.is_set() or isinstance(error, PermissionError):
                    cure = _RESUME.format(cure="make room or restore access")
                    raise StoreError(f"cannot {what}: {error} (tried {attempt} times). {cure}") from error
                self.retries += 1
                self._closed.wait(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, retry.longest_pause)
        raise AssertionError("unreachable")
