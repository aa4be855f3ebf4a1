"""Objects as files of a local or network file system."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from udddm.errors import StoreError
from udddm.files import UNSUPPORTED, complete_file, lock_file, make_directory, sync_directory
from udddm.storage.base import _RESUME, _TEMPORARY, ObjectStore


class LocalObjectStore(ObjectStore):
    """Files under a directory. An object is written under a temporary name, synced, and renamed to its final name.

    Its name is durable after `sync`: syncing the directories after every put would double the cost of a put.
    """

    _serial = itertools.count()

    def __init__(self, root: Path):
        super().__init__()
        self.root = root.resolve()  # so that two spellings of a path are recognized as the same
        self._unsynced: set[str] = set()  # of each, all directories from the root down to it
        self._unsynced_lock = threading.Lock()
        self._syncing = threading.Lock()
        self._has_locks: bool | None = None

    def _get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None:
        try:
            with self._written(key, parts) as temporary:
                temporary.replace(self.root / key)
            self._remember(key)
        except FileNotFoundError as error:  # another rank deleted the generation; the next attempt recreates it
            raise OSError(errno.ESTALE, f"the directory of {self.root / key} was deleted meanwhile") from error

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        with self._written(key, (data,)) as temporary:
            try:
                os.link(temporary, self.root / key)  # unlike a rename, fails if the name exists
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (*UNSUPPORTED, errno.EPERM):  # exFAT, CIFS and others have no hard links
                    raise
                return self._create(key, data)
        self._remember(key)
        return True

    def _create(self, key: str, data: bytes) -> bool:
        """`_put_if_absent` without hard links: a crash in between leaves an incomplete object."""
        try:
            with (self.root / key).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        self._remember(key)
        return True

    @property
    def conditional(self) -> bool:
        """Whether the file system has locks, which `compare_and_swap` needs."""
        if self._has_locks is None:
            make_directory(self.root)
            probe = self.root / f"locks-{os.getpid()}{_TEMPORARY}"
            with probe.open("wb") as file:
                self._has_locks = lock_file(file.fileno(), wait=True)
            probe.unlink(missing_ok=True)
        return self._has_locks

    def _remember(self, key: str) -> None:
        """Remember the directories from the root down to an object's own for the next `sync`.

        There may be a directory for every chunk of a lane, so only the names of the innermost are kept.
        """
        with self._unsynced_lock:
            self._unsynced.add(key.rpartition("/")[0])

    def _compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        path = self.root / key
        if not path.exists():
            return False
        with path.with_name(f"{path.name}.lock{_TEMPORARY}").open("wb") as lock:
            lock_file(lock.fileno(), wait=True)  # without locks, only the holder renews its own lease
            try:
                if path.read_bytes() != expected:
                    return False
            except FileNotFoundError:
                return False
            self._put(key, (data,))
            return True

    def _written(self, key: str, parts: tuple[bytes | memoryview, ...]) -> AbstractContextManager[Path]:
        """Write the parts to a synced file under a temporary name, which is deleted at the end unless it is renamed."""
        path = self.root / key
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(self._serial)}{_TEMPORARY}")

        def save(temporary: Path) -> None:
            try:
                file = temporary.open("xb")
            except FileNotFoundError:
                make_directory(self.root)  # those below it are synced by `sync`
                path.parent.mkdir(parents=True, exist_ok=True)
                file = temporary.open("xb")
            with file:
                file.writelines(parts)

        return complete_file(temporary, save)

    def sync(self) -> None:
        """Raises StoreError; the next call retries the directories that could not be synced."""
        with self._syncing:  # a second caller returns when its names are durable, whichever caller synced them
            with self._unsynced_lock:
                waiting, self._unsynced = self._unsynced, set()
            try:
                while waiting:
                    deepest = max(map(_depth, waiting))
                    for name in [each for each in waiting if _depth(each) == deepest]:
                        with suppress(FileNotFoundError):  # deleted since
                            sync_directory(self.root / name)
                        waiting.remove(name)
                        if name:
                            waiting.add(name.rpartition("/")[0])
            except OSError as error:
                raise StoreError(
                    f"cannot sync {self.root / name}: {error}. {_RESUME.format(remedy='make room or restore access')}"
                ) from error
            finally:
                with self._unsynced_lock:
                    self._unsynced |= waiting

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


def _depth(name: str) -> int:
    """The number of directories from the root, which is "", to a directory."""
    return name.count("/") + 1 if name else 0
