"""Objects that are not on a local disk: S3, GCS and Azure through obstore, everything else through fsspec."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from udddm.errors import StoreError
from udddm.storage.base import REMOTE_RETRY, ObjectStore, Oversized, PermanentStorageError
from udddm.storage.failures import of_obstore, refusal

T = TypeVar("T")

REQUEST_TIMEOUT = 30.0  # seconds for a complete request: a chunk of 8 MB at 280 kB/s
CONNECT_TIMEOUT = 5.0  # seconds
PART = 8 << 20
"""Bytes of a file per request."""

_STORES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}  # scheme: class of obstore
_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_STORAGE_"}
_PAGE = 1000
"""Keys that S3 lists or deletes per request."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def _check_environment(prefix: str) -> None:
    """Raise StoreError for a variable that obstore, which reads the environment itself, would panic at in a request.

    One that is set to nothing, as compose files and charts leave it, is as good as none, but not to obstore.
    """
    for name, value in list(os.environ.items()):
        if not name.startswith(prefix):
            continue
        if not value.strip():
            del os.environ[name]
        elif value != value.strip() or not value.isprintable():
            raise StoreError(
                f"the environment variable {name} begins or ends with a space or line break, or holds a control "
                "character: remove it there, such as the newline at the end of a secret's file"
            )


class S3ObjectStore(ObjectStore):
    """Objects under `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.

    obstore makes a single attempt per request, so that `retries` counts all retries. An object is written by a single
    request, which carries the SHA-256 of its body and which S3 makes visible completely or not at all. The length of a
    read object is checked, and obstore reports a reply that ends early.
    """

    retry = REMOTE_RETRY

    def __init__(self, location: str, scheme: str = "s3", *, timeout: float = REQUEST_TIMEOUT):
        """`location` is `bucket/prefix`, `timeout` the total seconds that a request may take. Raises StoreError."""
        super().__init__()
        try:
            import obstore
            from obstore import store as obstore_stores
        except ImportError:
            raise StoreError(f"store.url {scheme}://{location} needs obstore: pip install 'udddm[s3]'") from None
        self._obstore = obstore
        bucket, _, prefix = location.partition("/")
        prefix = prefix.strip("/")
        self._url = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        # Otherwise obstore panics in the middle of a request when it cannot parse the value.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
            raise StoreError(f"store.url {scheme}://{location}: give a bucket name, as in s3://bucket/prefix")
        endpoint = next((os.environ[n] for n in _ENDPOINTS if os.environ.get(n)), "") if scheme == "s3" else ""
        if endpoint and not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", endpoint):
            raise StoreError("AWS_ENDPOINT_URL is not a URL: write http://host:port or https://host")
        _check_environment(_VARIABLES[scheme])
        failure = ""
        try:
            self._store = getattr(obstore_stores, _STORES[scheme])(
                bucket,
                prefix=prefix or None,
                config={"endpoint": endpoint} if endpoint else None,
                client_options={
                    "allow_http": endpoint.startswith("http://"),
                    "timeout": timedelta(seconds=timeout),
                    "connect_timeout": timedelta(seconds=min(timeout, CONNECT_TIMEOUT)),
                },
                retry_config={"max_retries": 0},
            )
        except Exception as error:  # its text may contain the values of the variables
            failure = type(error).__name__
        if failure:
            raise StoreError(
                f"cannot open {self._url}: {failure}; check the environment's {_VARIABLES[scheme]} variables"
            )
        self._answered = False

    def _get(self, key: str) -> bytes:
        return self._read(key)[0]

    def _read(self, key: str) -> tuple[bytes, dict[str, str]]:
        """The object's bytes, and the condition for a put that may replace only this version."""

        def read() -> tuple[bytes, Any]:
            result = self._obstore.get(self._store, key)
            return result.bytes().to_bytes(), result.meta

        data, meta = self._asking(read, reading=True)
        if len(data) != meta["size"]:
            raise OSError(f"the reply was cut: received {len(data)} of {meta['size']} bytes")
        return data, _version(meta)

    def _put(self, key: str, parts: Iterable[bytes | memoryview]) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        if self.guard.fences:
            self._put_fenced(key, views)
            return
        self._asking(lambda: self._obstore.put(self._store, key, iter(views), use_multipart=False))

    def _put_fenced(self, key: str, views: Sequence[memoryview]) -> None:
        """Never overwrite an object of a successor, however long this process was paused in between.

        The version of an existing object is read before the guard is checked. If the guard still allows the write, that
        version was not written by a successor, and the condition fails once a successor has replaced it.
        """
        if self._put_on_condition(key, views, "create"):
            return
        try:
            found = self._asking(lambda: self._obstore.head(self._store, key), reading=True)
        except FileNotFoundError:
            raise OSError("it was deleted meanwhile") from None
        self.guard.wait()
        if not self._put_on_condition(key, views, _version(found)):
            raise OSError("another client replaced it meanwhile")

    def _upload(self, path: Path, key: str) -> None:
        if not self.guard.fences:  # obstore splits larger files into parts
            self._asking(lambda: self._obstore.put(self._store, key, path, chunk_size=PART))
        elif path.stat().st_size <= PART:
            self._put(key, (path.read_bytes(),))
        else:
            self._upload_guarded(path, key)

    def _upload_guarded(self, path: Path, key: str) -> None:
        """Upload in parts. All parts together take long, so the guard is checked before each one, and before the object
        becomes visible."""
        writer = self._obstore.open_writer(self._store, key, buffer_size=PART)
        with path.open("rb") as file:
            while block := file.read(PART):
                self.guard.wait()
                self._asking(partial(writer.write, block))
        self.guard.wait()
        self._asking(writer.close)  # a writer that is not closed leaves no object

    def _download(self, key: str, path: Path, most: int | None) -> None:
        """Read in ranges, so that the request timeout does not limit the size of the object."""
        size = self._asking(lambda: self._obstore.head(self._store, key), reading=True)["size"]
        if most is not None and size > most:
            raise Oversized(f"it has {size} bytes instead of {most}")
        with path.open("wb") as file:
            for start in range(0, size, PART):
                end = min(size, start + PART)
                request = partial(self._obstore.get_range, self._store, key, start=start, end=end)
                part = self._asking(request, reading=True)
                file.write(part.to_bytes())

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        return self._put_on_condition(key, (data,), "create")

    def _compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        try:
            found, version = self._read(key)
        except FileNotFoundError:
            return False
        return found == expected and self._put_on_condition(key, (data,), version)

    def _put_on_condition(self, key: str, parts: Sequence[bytes | memoryview], mode: Any) -> bool:
        failed = (self._obstore.exceptions.AlreadyExistsError, self._obstore.exceptions.PreconditionError)

        def put() -> bool:
            try:
                self._obstore.put(self._store, key, iter(parts), mode=mode, use_multipart=False)
            except failed:
                return False
            return True

        return self._asking(put)

    def _list(self, prefix: str) -> Sequence[str]:
        return [path.rpartition("/")[2] for path in self._listed(prefix) if path != prefix]

    def _listed(self, prefix: str) -> Sequence[str]:
        """The paths directly under a prefix; for an empty directory, which SeaweedFS keeps, the directory's path."""
        found = self._asking(lambda: self._obstore.list_with_delimiter(self._store, prefix or None))
        return sorted({*found["common_prefixes"], *(each["path"] for each in found["objects"])})

    def _under(self, prefix: str) -> Sequence[Any]:
        """obstore's metadata of every object under a prefix."""
        pages = self._asking(lambda: list(self._obstore.list(self._store, prefix or None, chunk_size=_PAGE)))
        return [each for page in pages for each in page]

    def _sizes(self, prefix: str) -> dict[str, int]:
        return {each["path"].removeprefix(prefix).lstrip("/"): each["size"] for each in self._under(prefix)}

    def _delete(self, prefix: str) -> None:
        keys = [each["path"] for each in self._under(prefix)]
        self._delete_keys([*keys, prefix])
        if not self._listed(prefix):
            return
        # SeaweedFS lists directories for minutes after their objects are deleted. Deleting the directory's key as an
        # object removes an empty one.
        parents = {key.rsplit("/", n)[0] for key in keys for n in range(1, key.count("/") + 1)}
        self._delete_directories({path for path in parents if path.startswith(f"{prefix}/")} | {prefix})
        self._delete_directories({*self._directories(prefix), prefix})

    def _directories(self, prefix: str) -> Iterator[str]:
        for path in self._listed(prefix):
            if path != prefix:
                yield path
                yield from self._directories(path)

    def _delete_directories(self, directories: set[str]) -> None:
        for depth in sorted({d.count("/") for d in directories}, reverse=True):
            self._delete_keys([d for d in directories if d.count("/") == depth])  # one request: the order matters

    def _delete_keys(self, keys: Sequence[str]) -> None:
        """Delete one page of keys per request, and check the guard before each."""

        def delete(page: Sequence[str]) -> None:
            try:
                self._obstore.delete(self._store, page)
            except FileNotFoundError as error:  # a missing bucket, or an object on a server that reports missing ones
                if "NoSuchBucket" in str(error):
                    raise

        named = [key for key in keys if key]
        for first in range(0, len(named), _PAGE):
            self.guard.wait()
            self._asking(partial(delete, named[first : first + _PAGE]))

    def uri(self, key: str) -> str:
        return f"{self._url}/{key}".rstrip("/")

    def _asking(self, request: Callable[[], T], *, reading: bool = False) -> T:
        """The request's result. Raises PermanentStorageError, OSError and, if `reading`, FileNotFoundError, without the
        text of the reply."""
        try:
            result = request()
            self._answered = True
            return result
        except Exception as error:
            failure = of_obstore(error, answered=self._answered)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a library in Rust, for example for an odd variable
                raise
            failure = PermanentStorageError("the request could not be made", "check the credentials and the endpoint")
        if isinstance(failure, FileNotFoundError) and not reading:
            failure = refusal(404, "")
        raise failure  # outside the handler, so that the original is not chained to it


def _version(meta: Any) -> dict[str, str]:
    """Identifies the content of an object: by its tag on S3 and Azure, by its version on GCS."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}
