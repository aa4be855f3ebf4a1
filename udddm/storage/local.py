"""TODO."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from udddm.storage.base import _TEMPORARY, ObjectStore


class LocalObjectStore(ObjectStore):
    """Files under a directory. An object is written under another name, synced, and renamed into place.

    Its name is durable after `sync`: to sync the directories after every put would cost a store as much again.
    """

    _serial = itertools.count()

    def __init__(self, root: Path):
        super().__init__()
        self.root = root.resolve()  # so that two spellings of a path are seen to be one place
        self._unsynced: set[Path] = set()
        self._unsynced_lock = threading.Lock()

    def _get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None:
        try:
            with self._written(key, parts) as temporary:
                temporary.replace(self.root / key)
            with self._unsynced_lock:
                self._unsynced.update((self.root / key).parents[: key.count("/") + 1])
        except FileNotFoundError as error:  # another rank has just removed the generation; the next attempt remakes it
            raise OSError(errno.ESTALE, f"the directory of {self.root / key} was removed meanwhile") from error

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        with self._written(key, (data,)) as temporary:
            try:
                os.link(temporary, self.root / key)  # unlike a rename, fails when there is one
            except FileExistsError:
                return False
            return True

    def _compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        path = self.root / key
        if not path.exists():
            return False
        with path.with_name(f"{path.name}.lock{_TEMPORARY}").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if path.read_bytes() != expected:
                    return False
            except FileNotFoundError:
                return False
            self._put(key, (data,))
            return True

    @contextmanager
    def _written(self, key: str, parts: tuple[bytes | memoryview, ...]) -> Iterator[Path]:
        """The parts in a synced file under another name, which is removed in the end unless it is renamed."""
        path = self.root / key
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(self._serial)}{_TEMPORARY}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part).cast("B")
                    while view:
                        view = view[file.write(view) :]
                os.fsync(descriptor)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def sync(self) -> None:
        with self._unsynced_lock:
            directories, self._unsynced = self._unsynced, set()
        for directory in sorted(directories, key=lambda d: -len(d.parts)):
            try:
                descriptor = os.open(directory, os.O_RDONLY)
            except FileNotFoundError:  # removed since
                continue
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _list(self, prefix: str) -> Sequence[str]:
        try:
            with os.scandir(self.root / prefix) as entries:
                return [e.name for e in entries if not e.name.endswith(_TEMPORARY)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _sizes(self, prefix: str) -> dict[str, int]:
        root = self.root / prefix
        files = (p for p in root.rglob("*") if not p.name.endswith(_TEMPORARY) and p.is_file())
        return {p.relative_to(root).as_posix(): p.stat().st_size for p in files}

    def _delete(self, prefix: str) -> None:
        path = self.root / prefix
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def uri(self, key: str) -> str:
        return str(self.root / key)
