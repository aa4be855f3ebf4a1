"""Whole objects under keys: the little that the store asks of a place that keeps bytes."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from udddm.store.errors import StoreError

T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE = 0.05  # seconds; doubled at each attempt, with jitter
_TEMPORARY = ".partial"


class Objects(ABC):
    """Keys are relative paths with `/`. A put is atomic: a reader sees the whole object or none."""

    def __init__(self) -> None:
        self.retries = 0

    @abstractmethod
    def _get(self, key: str) -> bytes: ...

    @abstractmethod
    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None: ...

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """The names directly under `prefix`, objects and prefixes alike; none when there is no such prefix."""

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Remove the object or everything under the prefix; nothing happens when there is none."""

    @abstractmethod
    def describe(self, key: str) -> str:
        """What an error message calls the object."""

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError at once, StoreError after bounded retries of anything else."""
        return self._retrying(f"read {self.describe(key)}", lambda: self._get(key))

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        """Write an object, durably, from consecutive parts. Raises StoreError after bounded retries."""
        self._retrying(f"write {self.describe(key)}", lambda: self._put(key, parts))

    def exists(self, key: str) -> bool:
        parent, _, name = key.rpartition("/")
        return name in self.list(parent)

    def _retrying(self, what: str, action: Callable[[], T]) -> T:
        pause = FIRST_PAUSE
        for attempt in itertools.count(1):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if attempt == ATTEMPTS or isinstance(error, PermissionError):
                    raise StoreError(
                        f"cannot {what}: {error} (tried {attempt} times). The last checkpoint is intact; "
                        "make room or restore access, then run the same command again to resume"
                    ) from error
                self.retries += 1
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause *= 2
        raise AssertionError("unreachable")


class LocalObjects(Objects):
    """Files under a directory. An object is written under another name, synced, and renamed into place."""

    _serial = itertools.count()

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def _get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None:
        path = self.root / key
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(self._serial)}{_TEMPORARY}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part).cast("B")
                    while view:
                        view = view[file.write(view) :]
                os.fsync(descriptor)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def list(self, prefix: str) -> Iterator[str]:
        try:
            with os.scandir(self.root / prefix) as entries:
                yield from [e.name for e in entries if not e.name.endswith(_TEMPORARY)]
        except (FileNotFoundError, NotADirectoryError):
            return

    def delete(self, prefix: str) -> None:
        path = self.root / prefix
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def describe(self, key: str) -> str:
        return str(self.root / key)


def open_objects(url: str | Path) -> Objects:
    """The objects at a local path or `file://` URL. Raises StoreError for a URL of another kind."""
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalObjects(Path(text))
    if scheme == "file":
        return LocalObjects(Path(rest))
    raise StoreError(f"store.url {text}: only local paths and file:// URLs are supported, not {scheme}://")
