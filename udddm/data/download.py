"""Downloads that arrive whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from udddm.errors import DataError
from udddm.files import home_cache

_BLOCK = 1 << 20  # bytes read at a time


def cache_directory() -> Path:
    """Where downloads are kept: udddm in XDG_CACHE_HOME, or in ~/.cache, or in the directory of temporary files where
    there is no home directory to write to."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    return Path(configured) / "udddm" if Path(configured).is_absolute() else home_cache()


def md5_of(path: Path) -> str:
    """The MD5 of a file's bytes, in hexadecimal: against damage, not against malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def fetch(url: str, destination: Path, md5: str, *, timeout: float = 30.0) -> Path:
    """Download `url` to `destination` unless a file with the checksum `md5` is there already; return `destination`.

    The bytes go to a temporary file beside it, which is renamed once its checksum is right: an interrupted download
    leaves nothing (one that is killed outright leaves a `.part` file), and several processes may fetch the
    same file. `timeout` is how many seconds the server may stay silent. Raises DataError if the server cannot be
    reached or answers with an error, the transfer is cut, the checksum is wrong or the file cannot be written.
    """
    if destination.is_file() and md5_of(destination) == md5:
        return destination
    by_hand = f"download it by hand and set data.path, if {url} is out of reach from here"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{destination.name}.", suffix=".part", dir=destination.parent)
    except OSError as error:
        raise DataError(
            f"cannot write to {destination.parent}: {error}; set XDG_CACHE_HOME to a directory you own"
        ) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _transfer(url, file, timeout)
        if digest != md5:
            raise DataError(f"{url} came with the MD5 {digest} instead of {md5}: try again, or {by_hand}")
        part.chmod(0o644)  # mkstemp gives 0600, but a cache may be shared
        part.replace(destination)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"{url}: the server answered {error.code} {error.reason}; {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors; a full disk is too
        raise DataError(f"downloading {url} failed: {error or type(error).__name__}; {by_hand}") from error
    finally:
        part.unlink(missing_ok=True)  # gone already if it was renamed
    return destination


def _transfer(url: str, file: BinaryIO, timeout: float) -> str:
    """Copy what the server sends to `file`, with a progress bar on a terminal; the MD5 of it."""
    from tqdm import tqdm

    digest = _md5()
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
    if total is not None and received != total:  # http.client tells a cut only to those who read all at once
        raise DataError(f"{url} broke off after {received} of {total} bytes: try again")
    return digest.hexdigest()


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
