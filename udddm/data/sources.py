"""The built-in data sets: digits, and the training splits of Fashion-MNIST and CIFAR-10.

`digits.npz`, next to this file, is the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C.
Kaynak, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49; license CC BY 4.0), in the order and
with the values of scikit-learn's `load_digits`: `images` uint8 [1797, 8, 8], each pixel the number of ink dots 0..16 in
a 4x4 block of the scan, and `labels` uint8 [1797].
"""

from __future__ import annotations

import gzip
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from udddm.data.download import cache_directory, fetch, md5_of
from udddm.data.images import ArrayImages
from udddm.errors import DataError

Bytes = npt.NDArray[np.uint8]

DIGITS = Path(__file__).with_name("digits.npz")


def digits() -> ArrayImages:
    """UCI's 8x8 digits: float32 [1797, 1, 8, 8], the values 0..16 mapped to value / 8 - 1; labels 0..9."""
    with np.load(DIGITS) as stored:
        images, labels = stored["images"], stored["labels"]
    return ArrayImages(images[:, None].astype(np.float32) / 8 - 1, labels.astype(np.int64), classes=10, name="digits")


@dataclass(frozen=True)
class Remote:
    """A file to download and its MD5."""

    url: str
    md5: str


@dataclass(frozen=True)
class IdxFile:
    """A gzipped IDX file: the shape of its array, the CRC-32 of its contents, and the location of the official file."""

    name: str
    shape: tuple[int, ...]
    crc32: int
    remote: Remote


_FASHION_MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # installed by the package dataset-fashion-mnist
FASHION_IMAGES = IdxFile(
    "train-images-idx3-ubyte.gz",
    (60_000, 28, 28),
    0xB4F29F28,
    Remote(_FASHION_MIRROR + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
)
FASHION_LABELS = IdxFile(
    "train-labels-idx1-ubyte.gz",
    (60_000,),
    0x741A4657,
    Remote(_FASHION_MIRROR + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
)


def fashion_mnist(
    path: Path | None = None,
    *,
    images: IdxFile = FASHION_IMAGES,
    labels: IdxFile = FASHION_LABELS,
    system: Path = FASHION_DEBIAN,
) -> ArrayImages:
    """Fashion-MNIST (Xiao et al. 2017): uint8 [60000, 1, 28, 28], labels 0..9.

    Read from the directory `path`. Without it, read from the Debian package dataset-fashion-mnist if installed, or
    otherwise from the cache, after a download of 26 MB. Raises DataError for a missing or corrupt file, a file of
    another data set (those of MNIST have the same names and shapes), or a failed download.
    """
    if path is None and all((system / file.name).is_file() for file in (images, labels)):
        path = system
    if path is None:
        path = cache_directory() / "fashion-mnist"
        for file in (images, labels):
            fetch(file.remote.url, path / file.name, file.remote.md5)
    pixels, targets = (_read_idx(path / file.name, file) for file in (images, labels))
    return ArrayImages(pixels[:, None], targets, classes=10, name=f"Fashion-MNIST in {path}")


# Debian repacks the gzip files without name and time in the headers, which changes the MD5 of the compressed files.
# Therefore the checksum of the contents is compared.
def _read_idx(path: Path, expected: IdxFile) -> Bytes:
    content = _gunzip(path)
    array = _parse_idx(content, path)
    if array.shape != expected.shape:
        raise DataError(f"{path} contains an array of shape {list(array.shape)}, not {list(expected.shape)}")
    if zlib.crc32(content) != expected.crc32:
        raise DataError(
            f"{path} has the right shape but the wrong contents: does it belong to another data set (MNIST)?"
        )
    return array


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: data.path must be the directory with the gzipped IDX files") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} as a gzip file: {error}") from error


def _parse_idx(content: bytes, path: Path) -> Bytes:
    """Parse IDX: two zero bytes, a type code (8 is uint8), the number of dimensions, each dimension as big-endian
    uint32, and the data."""
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise DataError(f"{path} is not an IDX file of uint8: it starts with {content[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path} ends within its IDX header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    data = np.frombuffer(content, dtype=np.uint8, offset=start)
    expected = 1
    for side in shape:
        expected *= side
    if len(data) != expected:
        raise DataError(
            f"{path} contains {len(data)} bytes of data, but its header announces {list(shape)}: {expected} bytes"
        )
    return data.reshape(shape)


CIFAR10 = Remote("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_RECORD = 1 + 3 * 32 * 32  # a label, then red, green and blue planes


def cifar10(path: Path | None = None, *, remote: Remote = CIFAR10, records: int = 10_000) -> ArrayImages:
    """CIFAR-10 (Krizhevsky 2009), the binary version: uint8 [50000, 3, 32, 32], labels 0..9.

    `path` is the archive cifar-10-binary.tar.gz, whose MD5 must be that of `remote`, or its unpacked directory
    cifar-10-batches-bin. Without it, the archive is downloaded to the cache (170 MB). Each of the five batches has
    `records` images. Raises DataError for a missing or corrupt file or a failed download.
    """
    if path is None:
        path = fetch(remote.url, cache_directory() / "cifar-10-binary.tar.gz", remote.md5)
    elif path.is_file():
        digest = md5_of(path)
        if digest != remote.md5:
            raise DataError(
                f"{path} has the MD5 {digest}, but cifar-10-binary.tar.gz has {remote.md5}: "
                f"download {remote.url} again, or unpack the archive you trust and give its directory {CIFAR10_FOLDER}"
            )
    elif not path.is_dir():
        raise DataError(f"{path} does not exist: give cifar-10-binary.tar.gz or the directory {CIFAR10_FOLDER}")
    batches = _cifar10_directory(path, records) if path.is_dir() else _cifar10_archive(path, records)
    rows = np.concatenate([_parse_cifar10(content, name, records) for name, content in batches])
    return ArrayImages(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], classes=10, name=f"CIFAR-10 in {path}")


def _cifar10_directory(path: Path, records: int) -> Iterator[tuple[str, bytes]]:
    for name in CIFAR10_BATCHES:
        file = path / name
        if not file.is_file():
            raise DataError(f"{file} does not exist: {path} is not a complete {CIFAR10_FOLDER}")
        _check_batch_size(file.stat().st_size, str(file), records)
        yield str(file), file.read_bytes()


def _cifar10_archive(path: Path, records: int) -> Iterator[tuple[str, bytes]]:
    """Yields the batches in order, read into memory. Names in the archive are never used as paths on the disk."""
    found = {}
    wanted = {f"{CIFAR10_FOLDER}/{name}": name for name in CIFAR10_BATCHES}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None or not member.isreg():
                    continue
                _check_batch_size(member.size, f"{member.name} in {path}", records)
                file = archive.extractfile(member)
                assert file is not None  # a regular file always has contents
                found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} as a gzipped tar archive: {error}") from error
    for name in CIFAR10_BATCHES:
        if name not in found:
            raise DataError(
                f"{path} does not contain {CIFAR10_FOLDER}/{name}: it is not the binary version of CIFAR-10"
            )
        yield f"{name} in {path}", found.pop(name)


def _check_batch_size(size: int, name: str, records: int) -> None:
    if size != records * _RECORD:
        raise DataError(f"{name} has {size} bytes, but a CIFAR-10 batch has {records * _RECORD}")


def _parse_cifar10(content: bytes, name: str, records: int) -> Bytes:
    _check_batch_size(len(content), name, records)  # again: a truncated archive may contain less than it announces
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD)
    worst = int(rows[:, 0].argmax())
    if rows[worst, 0] > 9:
        raise DataError(f"{name} has the label {rows[worst, 0]} in record {worst}: CIFAR-10's are 0..9")
    return rows
