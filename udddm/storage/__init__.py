"""Objects under keys, on a local disk, S3, or any fsspec file system."""

from __future__ import annotations

import re
from pathlib import Path

from udddm.errors import StoreError
from udddm.files import expanded
from udddm.storage.base import ObjectStore, PermanentStorageError, Retry
from udddm.storage.local import LocalObjectStore
from udddm.urls import secret_in

__all__ = ["LocalObjectStore", "ObjectStore", "PermanentStorageError", "Retry", "local_path", "open_object_store"]


ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
"""Other names of schemes; s3a and s3n are Hadoop's. Stores are the same by either name."""


def local_path(where: str | Path) -> Path | None:
    """The local path of a path or file:// URL, with ~ expanded; None for any other URL.

    Raises ConfigError for a URL that lost a slash.
    """
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        return expanded(where)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else None


def open_object_store(url: str | Path) -> ObjectStore:
    """Open a local path or a URL: file://, s3://, gs://, az:// (through obstore), or any scheme that fsspec supports.

    An S3 store's endpoint, region and credentials come from the usual AWS environment variables. No request is made
    yet. Raises StoreError if the URL is malformed or contains a password or query, or if a package is missing.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if isinstance(url, str) and not separator and re.match(r"(file|memory|s3|gs|gcs|az|abfs|https?):", text):
        raise StoreError(f"store.url {text}: write two slashes after the scheme, as in s3://bucket/prefix")
    local = local_path(url)
    if local is not None:
        return LocalObjectStore(local)
    return _open_remote(ALIASES.get(scheme.lower(), scheme.lower()), rest)


def _open_remote(scheme: str, rest: str) -> ObjectStore:
    if (what := secret_in(f"{scheme}://{rest}")) or "?" in rest or "#" in rest:
        raise StoreError(
            f"store.url {scheme}://...: remove the {what or '? or #'} from the URL; "
            "give credentials in environment variables"
        )
    parts = rest.rstrip("/").split("/")
    if scheme in ("s3", "gs", "az") and any(part in ("", ".", "..") for part in parts[1:]):
        raise StoreError(f"{scheme}://{rest}: leave out empty parts (//), . and .., which keys of objects cannot have")
    if scheme in ("s3", "gs", "az"):  # a run on local files need not import these
        from udddm.storage.s3 import S3ObjectStore

        return S3ObjectStore(rest, scheme)
    from udddm.storage.filesystem import FsspecObjectStore

    return FsspecObjectStore(f"{scheme}://{rest}")
