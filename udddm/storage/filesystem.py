"""Objects in any file system that fsspec supports."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from udddm.errors import StoreError
from udddm.storage.base import REMOTE_RETRY, ObjectStore, Oversized
from udddm.storage.failures import of_fsspec

T = TypeVar("T")


class FsspecObjectStore(ObjectStore):
    """Objects under any URL that fsspec supports, such as sftp://host/path.

    A put is as atomic as in the file system. Object stores show an object completely or not at all. sftp and the like
    do not; there the checksums of chunks and records detect truncated objects. `put_if_absent` is exclusive if the file
    system creates files exclusively (gcsfs, s3fs). `compare_and_swap` is exclusive only between the threads of one
    process, so a lease there is never taken over from another process, unless the file system is private to this one.
    """

    retry = REMOTE_RETRY
    _exclusive = threading.Lock()

    def __init__(self, url: str):
        """Raises StoreError if the URL is malformed, its scheme is unknown, or the package for it is missing."""
        super().__init__()
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        scheme = url.partition("://")[0]
        try:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
                raise ValueError("malformed")
            fsspec.get_filesystem_class(scheme)
            try:
                self._fs, root = fsspec.core.url_to_fs(url, **options)
            except TypeError:  # a file system without options of this name
                self._fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise StoreError(f"store.url {url}: {error}") from None
        except ValueError:
            raise StoreError(f"store.url {url}: fsspec and obstore do not support {scheme}:// URLs") from None
        except Exception as error:
            raise StoreError(
                f"cannot open {url}: {type(error).__name__}; check the URL and this machine's credentials for it"
            ) from None
        self._root = str(root).rstrip("/")
        self._url = url.rstrip("/")
        self._scheme = scheme

    @property
    def conditional(self) -> bool:
        return self._scheme == "memory"

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    def _get(self, key: str) -> bytes:
        return bytes(self._asking(lambda: self._fs.cat_file(self._path(key))))

    def _put(self, key: str, parts: Iterable[bytes | memoryview]) -> None:
        data = b"".join(parts)
        self._asking(lambda: self._pipe(key, data, "overwrite"))

    def _upload(self, path: Path, key: str) -> None:
        def upload() -> None:
            target = self._path(key)
            try:
                self._fs.put_file(str(path), target)
            except FileNotFoundError:  # a file system with real directories
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(path), target)

        self._asking(upload)

    def _download(self, key: str, path: Path, most: int | None) -> None:
        """Stops at `most` bytes, by the announced size and also by the received bytes, because a web server may
        announce a different size than it sends."""
        from fsspec.callbacks import Callback

        class Received(Callback):  # type: ignore[misc]
            over = False

            def call(self, *_: Any, **__: Any) -> None:
                if most is not None and self.value > most:
                    self.over = True
                    raise OSError("too large")

        received = Received()

        def get() -> None:
            if most is not None:
                received.absolute_update(self._fs.info(self._path(key)).get("size") or 0)
                received.value = 0
            self._fs.get_file(self._path(key), str(path), callback=received)

        try:
            self._asking(get)
        except OSError:
            if received.over:
                raise Oversized(f"it has more than its {most} bytes") from None
            raise

    def _pipe(self, key: str, data: bytes, mode: str) -> None:
        path = self._path(key)
        try:
            self._fs.pipe_file(path, data, mode=mode)
        except FileNotFoundError:  # a file system with real directories
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data, mode=mode)

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        def create() -> bool:
            with self._exclusive:
                self._fs.invalidate_cache()
                if self._fs.exists(self._path(key)):
                    return False
                try:
                    self._pipe(key, data, "create")
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno == 22:  # s3fs reports an existing object with this errno
                        return False
                    raise
                return True

        return self._asking(create)

    def _compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        with self._exclusive:
            try:
                if self._get(key) != expected:
                    return False
            except FileNotFoundError:
                return False
            self._put(key, (data,))
            return True

    def _list(self, prefix: str) -> Sequence[str]:
        path = self._path(prefix)

        def names() -> Sequence[str]:
            try:
                self._fs.invalidate_cache()
                found = self._fs.ls(path, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            own = path.strip("/")
            found_names = {p.rstrip("/").rpartition("/")[2] for p in found if p.strip("/") != own}
            return sorted(found_names - {"", ".", ".."})  # a web page may link to these

        return self._asking(names)

    def _sizes(self, prefix: str) -> dict[str, int]:
        path = self._path(prefix)

        def sizes() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(path, detail=True)
            return {p.strip("/").removeprefix(path.strip("/")).lstrip("/"): int(i["size"]) for p, i in found.items()}

        return self._asking(sizes)

    def _delete(self, prefix: str) -> None:
        def delete() -> None:
            try:
                self._fs.invalidate_cache()
                self._fs.rm(self._path(prefix), recursive=True)
            except FileNotFoundError:
                return

        self._asking(delete)

    def uri(self, key: str) -> str:
        return f"{self._url}/{key}".rstrip("/")

    def _asking(self, request: Callable[[], T]) -> T:
        """Translate errors as `S3ObjectStore` does, because the file systems' messages reveal too much and differ."""
        try:
            return request()
        except Exception as error:
            failure = of_fsspec(error)
        raise failure
