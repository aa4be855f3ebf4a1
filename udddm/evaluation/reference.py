"""Reference statistics from a .npz file: those of EDM, those of guided-diffusion (ADM), or images.

Files are data: pickles are refused, and the shape and type of every array are checked before it is read.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from udddm.data import ImageDataset
from udddm.data.images import ArrayImages
from udddm.errors import DataError
from udddm.evaluation.metrics import Array
from udddm.files import expanded
from udddm.log import log

DIMENSION = 16_384
"""The largest number of features. The covariance then takes 2 GB."""
IMAGES = 64 << 30
"""The largest size of the images of a file, in bytes."""
MOMENTS, PICTURES, IGNORED = ("mu", "sigma"), "arr_0", ("mu_s", "sigma_s", "arr_1")
"""The arrays of such files: mean and covariance; images; those of sFID and labels, which are not used."""
ASYMMETRY = 1e-4
"""The largest difference between a covariance and its transpose, relative to its largest value."""


@dataclass(frozen=True)
class ReferenceFile:
    """The contents of a file of reference statistics: moments, images, or both."""

    path: Path
    moments: tuple[Array, Array] | None
    """Mean [D] and covariance [D, D] in a feature space, which the file does not name."""
    images: ImageDataset | None


def read_reference(file: str | Path) -> ReferenceFile:
    """Read a .npz file with `mu` [D] and `sigma` [D, D] (EDM, pytorch-fid), `arr_0`, uint8 images [N, H, W, C]
    (guided-diffusion), or all of these.

    Raises DataError, which names the file and the array, if it does not exist, is not such a file, contains pickled
    objects, or has shapes or values that are no statistics.
    """
    path = expanded(file)
    if path.suffix.lower() in (".pkl", ".pickle", ".pt", ".pth"):
        raise DataError(
            f"{path}: reference statistics are read from .npz files only. A pickle can execute code: convert it where "
            "you trust it, with numpy.savez(FILE, mu=mean, sigma=covariance)"
        )
    try:
        with path.open("rb") as source, np.lib.npyio.NpzFile(source, allow_pickle=False) as archive:
            return _read(archive, path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give a .npz file of reference statistics") from error
    except DataError:
        raise
    except Exception as error:  # zip files fail in many ways: BadZipFile, zlib.error, EOFError, NotImplementedError ...
        raise DataError(f"cannot read {path} as a .npz file: {error}") from error


def _read(archive: Any, path: Path) -> ReferenceFile:
    names = archive.files
    moments, images = None, None
    if any(name in names for name in MOMENTS):
        moments = _moments(archive, path)
    if PICTURES in names:
        array = _array(archive, PICTURES, path, "u", 4, IMAGES)
        images = ImageDataset(ArrayImages(array, name=f"{PICTURES} of {path}"))
    if moments is None and images is None:
        raise DataError(
            f"{path} has {', '.join(names) or 'no arrays'}: expected mu and sigma (statistics), or arr_0 (images)"
        )
    if over := [name for name in names if name not in (*MOMENTS, PICTURES)]:
        known = "sFID and labels are not computed from them; " if set(over) & set(IGNORED) else ""
        log.warning(f"{path}: {', '.join(over)} not used ({known}read are mu, sigma and arr_0)")
    return ReferenceFile(path, moments, images)


def _moments(archive: Any, path: Path) -> tuple[Array, Array]:
    for name in MOMENTS:
        if name not in archive.files:
            raise DataError(f"{path} has no {name}: statistics are mu [D] and sigma [D, D]")
    mean = _array(archive, "mu", path, "f", 1, 8 * DIMENSION).astype(np.float64)
    covariance = _array(archive, "sigma", path, "f", 2, 8 * DIMENSION**2).astype(np.float64)
    size = len(mean)
    if covariance.shape != (size, size) or not size:
        raise DataError(f"{path}: sigma is {list(covariance.shape)}, expected [{size}, {size}], since mu is [{size}]")
    for name, values in (("mu", mean), ("sigma", covariance)):
        if not np.isfinite(values).all():
            raise DataError(f"{path}: {name} has values that are not finite")
    largest = float(np.abs(covariance).max())
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * largest or (covariance.diagonal() < 0).any():
        raise DataError(f"{path}: sigma is not a covariance, because it is not symmetric or has negative variances")
    return mean, covariance


def _array(archive: Any, name: str, path: Path, kind: str, axes: int, limit: int) -> npt.NDArray[Any]:
    """An array of the file, whose type, number of axes and size in bytes are checked before it is allocated."""
    member: zipfile.ZipInfo = archive.zip.getinfo(f"{name}.npy")
    with archive.zip.open(member) as content:
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} contains pickled objects, which are not read: they can execute code")
    expected = {"f": "floats", "u": "uint8"}[kind]
    if dtype.kind != kind or len(shape) != axes or (kind == "u" and dtype != np.uint8):
        raise DataError(f"{path}: {name} is {dtype} {list(shape)}, expected {expected} with {axes} axes")
    size = dtype.itemsize * int(np.prod(shape, dtype=object))
    if size > limit or size > member.file_size:
        raise DataError(f"{path}: {name} {list(shape)} is larger than the file or than {limit:,} bytes")
    found: npt.NDArray[Any] = archive[name]
    return found
