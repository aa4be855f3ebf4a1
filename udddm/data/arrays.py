"""Images in one stored array: .npy, .npz or Zarr, on a local disk or at any URL that fsspec knows."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from udddm.data.images import Array, ArrayImages, Ids
from udddm.errors import DataError


class ZarrImages(ArrayImages):
    """Images in a Zarr array, which stays where it is: each batch reads the chunks that hold its samples.

    A batch in random order costs a whole chunk for each sample in the worst case, and nothing is cached: choose chunks
    of a few samples (or a local .npy file, which is memory-mapped), or random access will be slow.
    """

    def _rows(self, ids: Ids) -> Array:
        # Sorted and without repeats, each chunk is read and decoded once a batch.
        unique, inverse = np.unique(ids, return_inverse=True)
        try:
            return np.asarray(self._images.oindex[unique])[inverse]
        except Exception as error:  # each file system and codec has errors of its own
            message = f"samples {ids.min()}..{ids.max()} of {self._name} cannot be read: {error}"
            raise DataError(message) from error


def open_array(url: str) -> ArrayImages:
    """The images at `url`, a path or an fsspec URL: a .npy or .npz file, or else a Zarr array or group.

    Images are uint8 or floats in [-1, 1] of shape [N, C, H, W] or [N, H, W], or uint8 [N, H, W, C]. A .npz file or Zarr
    group holds them as `images` or as its only array beside the optional `labels`, integers [N]. A local .npy is
    memory-mapped and Zarr is read as needed; .npz and remote .npy files are read into memory. Pickles are refused.

    Raises DataError if there is nothing at `url`, or what is there is damaged or no images.
    """
    url = url.removeprefix("file://")
    remote = "://" in url or "::" in url
    suffix = Path(url.rstrip("/")).suffix.lower()
    if not remote:
        url = str(Path(url).expanduser())
        if not Path(url).exists():
            raise DataError(f"{url} does not exist: data.path must be a .npy or .npz file or a Zarr array")
    if suffix == ".npy":
        return _open_npy(url, remote=remote)
    if suffix == ".npz":
        return _open_npz(url, remote=remote)
    return _open_zarr(url)


def _open_npy(url: str, *, remote: bool) -> ArrayImages:
    try:
        if remote:
            images = np.lib.format.read_array(io.BytesIO(_read_all(url)), allow_pickle=False)
        else:
            images = np.lib.format.open_memmap(url, mode="r")  # which never unpickles
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{url} cannot be read as a .npy file: {error}") from error
    return ArrayImages(images, name=url)


def _open_npz(url: str, *, remote: bool) -> ArrayImages:
    try:
        # Opened here, because numpy leaves a damaged file that it was given by name open.
        with (
            io.BytesIO(_read_all(url)) if remote else Path(url).open("rb") as file,
            np.lib.npyio.NpzFile(file, allow_pickle=False) as archive,
        ):
            images = archive[_choose(archive.files, url)]
            labels = archive["labels"] if "labels" in archive.files else None
    except DataError:
        raise
    except Exception as error:  # zip files fail in many ways: BadZipFile, zlib.error, EOFError, NotImplementedError ...
        raise DataError(f"{url} cannot be read as a .npz file: {error}") from error
    return ArrayImages(images, labels, name=url)


def _read_all(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
    except FileNotFoundError as error:
        raise DataError(f"there is nothing at {url}") from error
    except Exception as error:  # each file system has errors of its own
        raise DataError(f"{url} cannot be read: {error}") from error
    return content


def _open_zarr(url: str) -> ArrayImages:
    import zarr

    try:
        node = zarr.open(url, mode="r")
    except FileNotFoundError as error:  # the base of zarr's own errors for a node that is not there
        raise DataError(f"{url} holds no Zarr array or group (a numpy file must end in .npy or .npz)") from error
    except Exception as error:
        raise DataError(f"{url} cannot be opened as Zarr: {error}") from error
    if isinstance(node, zarr.Array):
        return ZarrImages(node, name=url)
    images: Any = node[_choose(node.array_keys(), url)]
    labels: Any = node.get("labels")
    return ZarrImages(images, None if labels is None else labels[...], name=url)


def _choose(keys: Iterable[str], url: str) -> str:
    """The key of the images among those of a file or group."""
    candidates = [key for key in keys if key != "labels"]
    if "images" in candidates:
        return "images"
    if len(candidates) != 1:
        found = ", ".join(candidates) if candidates else "none"
        raise DataError(f"{url} must hold one array of images, or one named 'images'; it holds: {found}")
    return candidates[0]
