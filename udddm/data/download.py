"""Atomic, verified downloads."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from udddm.errors import DataError
from udddm.files import home_cache

_BLOCK = 1 << 20  # bytes read at a time


def cache_directory() -> Path:
    """The directory for downloads: `udddm` in XDG_CACHE_HOME or ~/.cache, or in the directory of temporary files if the
    home directory is not writable."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification requires relative paths to be ignored.
    return Path(configured) / "udddm" if Path(configured).is_absolute() else home_cache()


def md5_of(path: Path) -> str:
    """The MD5 of a file in hexadecimal. It detects corruption, not tampering."""
    return _digest_of(path, _md5)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    return _digest_of(path, hashlib.sha256)


def _digest_of(path: Path, algorithm: Callable[[], hashlib._Hash]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(
    url: str,
    destination: Path,
    checksum: str,
    *,
    timeout: float = 30.0,
    manually: str = "download it manually and set data.path",
) -> Path:
    """Download `url` to `destination` unless it exists with this checksum. Returns `destination`.

    `checksum` is an MD5 (32 hexadecimal digits) or a SHA-256 (64). `manually` says what to do on a machine without this
    server, for error messages.

    The bytes are written to a temporary file in the same directory, which is renamed after its checksum was verified.
    An interrupted download therefore leaves nothing (a killed one leaves a `.part` file), and several processes may
    fetch the same file. `timeout` is the number of seconds that the server may send nothing. Raises DataError if the
    server cannot be reached or returns an error, the transfer is interrupted, the checksum is wrong or the file cannot
    be written.
    """
    name, algorithm = ("SHA-256", hashlib.sha256) if len(checksum) == 64 else ("MD5", _md5)
    if destination.is_file() and _digest_of(destination, algorithm) == checksum:
        return destination
    by_hand = f"if this machine cannot reach {url}, {manually}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{destination.name}.", suffix=".part", dir=destination.parent)
    except OSError as error:
        raise DataError(
            f"cannot write to {destination.parent}: {error}; set XDG_CACHE_HOME to a writable directory"
        ) from error
    part = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _transfer(url, file, timeout, algorithm())
        if digest != checksum:
            raise DataError(f"{url} has the {name} {digest} instead of {checksum}: try again; {by_hand}")
        part.chmod(0o644)  # mkstemp gives 0600, but a cache may be shared
        part.replace(destination)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"{url}: the server responded with {error.code} {error.reason}; {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors; a full disk is too
        raise DataError(f"downloading {url} failed: {error or type(error).__name__}; {by_hand}") from error
    finally:
        part.unlink(missing_ok=True)  # already renamed after success
    return destination


def _transfer(url: str, file: BinaryIO, timeout: float, digest: hashlib._Hash) -> str:
    """Copy the response to `file`, with a progress bar on a terminal. Returns its checksum, computed with `digest`."""
    from tqdm import tqdm

    with urllib.request.urlopen(url, timeout=timeout) as response:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced and announced.isdigit() else None
        received = 0
        with tqdm(total=total, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None) as bar:
            while block := response.read(_BLOCK):
                file.write(block)
                digest.update(block)
                received += len(block)
                bar.update(len(block))
    if (
        total is not None and received != total
    ):  # http.client reports a short response only for a single read of everything
        raise DataError(f"the download of {url} ended after {received} of {total} bytes: try again")
    return digest.hexdigest()


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
