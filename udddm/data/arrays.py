"""Images in one stored array: .npy, .npz or Zarr, on a local disk or at any URL that fsspec knows."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from udddm.data.images import Array, ArrayImages, Ids
from udddm.errors import DataError
from udddm.files import expanded

log = logging.getLogger(__name__)


class ZarrImages(ArrayImages):
    """Images in a Zarr array, which stays where it is: each batch reads the chunks that hold its samples.

    A batch in random order costs a whole chunk for each sample in the worst case, and nothing is cached: choose chunks
    of a few samples (or a local .npy file, which is memory-mapped), or random access will be slow.
    """

    check_missing = True
    """Whether a chunk that is not there is refused; see `data.missing_chunks`."""

    def _rows(self, ids: Ids) -> Array:
        # Sorted and without repeats, each chunk is read and decoded once a batch.
        unique, inverse = np.unique(ids, return_inverse=True)
        try:
            rows = np.asarray(self._images.oindex[unique])
            if self.check_missing:
                _check_chunks(self._images, rows, unique, self._name)
        except DataError:
            raise
        except Exception as error:  # each file system and codec has errors of its own
            message = f"samples {ids.min()}..{ids.max()} of {self._name} cannot be read: {error}"
            raise DataError(message) from error
        return rows[inverse]


def _check_chunks(array: Any, rows: Array, ids: Ids, name: str) -> None:
    """Raise DataError if rows of a Zarr array have the fill value because their chunk is not there.

    Zarr reads a missing chunk as its fill value. `rows` are the samples `ids` as they were read: only parts of them
    that hold nothing else are looked for in the store, so this costs a request for a black image and none otherwise.
    """
    fill = array.fill_value
    same = np.isnan(rows) if isinstance(fill, float | np.floating) and np.isnan(fill) else rows == fill
    suspects = ids[same.any(axis=tuple(range(1, same.ndim)))]
    sides = array.shards or array.chunks  # a shard is stored as one object
    checked = set()
    for index in suspects.tolist():
        row = same[np.searchsorted(ids, index)]
        counts = [-(-length // side) for length, side in zip(array.shape[1:], sides[1:], strict=True)]
        for place in np.ndindex(*counts):
            part = row[tuple(slice(at * side, (at + 1) * side) for at, side in zip(place, sides[1:], strict=True))]
            chunk = (index // sides[0], *place)
            if chunk in checked or not part.all():
                continue
            checked.add(chunk)
            if not _is_stored(array, chunk):
                raise DataError(
                    f"sample {index} of {name}: chunk {array.metadata.encode_chunk_key(chunk)} is missing, which Zarr "
                    f"reads as {fill}: copy the array again. If its writer left out chunks that hold nothing but "
                    f"{fill}, as Zarr does by default, set data.missing_chunks to fill"
                )


def _is_stored(array: Any, chunk: tuple[int, ...]) -> bool:
    from zarr.core.sync import sync

    return bool(sync((array.store_path / array.metadata.encode_chunk_key(chunk)).exists()))


LABELS = ("labels", "label", "y", "targets", "target")
"""What labels are called in a .npz file or Zarr group, in the order in which they are looked for."""
PAIRS = (("arr_0", "arr_1"), ("x_train", "y_train"), ("train_images", "train_labels"))
"""Images and labels of files of guided-diffusion and EDM, Keras and MedMNIST."""


def open_array(url: str, *, missing_chunks: Literal["stop", "fill"] = "stop") -> ArrayImages:
    """The images at `url`, a path or an fsspec URL: a .npy or .npz file, or else a Zarr array or group.

    Images are uint8 or floats in [-1, 1] of shape [N, C, H, W] or [N, H, W], or uint8 [N, H, W, C]. A .npz file or Zarr
    group holds them as `images` or as its only array, with optional labels, integers [N], under one of the names
    LABELS; or both by the names of PAIRS. A warning names arrays that are passed over. A local .npy is memory-mapped
    and Zarr is read as needed; .npz and remote .npy files are read into memory. Pickles are refused.

    `missing_chunks` says what a chunk that a Zarr array lacks means: "stop" takes it for damage, "fill" for chunks that
    hold nothing but the fill value.

    Raises DataError if there is nothing at `url`, or what is there is damaged or no images; reading a batch raises it
    for a missing chunk.
    """
    url = url.removeprefix("file://")
    remote = "://" in url or "::" in url
    suffix = Path(url.rstrip("/")).suffix.lower()
    if not remote:
        url = str(expanded(url))
        if not Path(url).exists():
            raise DataError(f"{url} does not exist: data.path must be a .npy or .npz file or a Zarr array")
    if suffix == ".npy":
        return _open_npy(url, remote=remote)
    if suffix == ".npz":
        return _open_npz(url, remote=remote)
    return _open_zarr(url, missing_chunks)


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
            image_key, label_key = _choose(archive.files, url)
            images = archive[image_key]
            labels = None if label_key is None else archive[label_key]
    except DataError:
        raise
    except Exception as error:  # zip files fail in many ways: BadZipFile, zlib.error, EOFError, NotImplementedError ...
        raise DataError(f"{url} cannot be read as a .npz file: {error}") from error
    found = ArrayImages(images, labels, name=url)
    _note_earlier(found, label_key)
    return found


def _note_earlier(found: ArrayImages, label_key: str | None) -> None:
    """Earlier versions read labels by no other name than `labels`."""
    if label_key not in (None, "labels"):
        found.earlier_labels = None


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


def _open_zarr(url: str, missing_chunks: str) -> ArrayImages:
    import zarr

    try:
        node = zarr.open(url, mode="r")
    except FileNotFoundError as error:  # the base of zarr's own errors for a node that is not there
        raise DataError(f"{url} holds no Zarr array or group (a numpy file must end in .npy or .npz)") from error
    except Exception as error:
        raise DataError(f"{url} cannot be opened as Zarr: {error}") from error
    label_key: str | None = None
    images: Any = node
    labels: Any = None
    if not isinstance(node, zarr.Array):
        image_key, label_key = _choose(node.array_keys(), url)
        images = node[image_key]
        labels = None if label_key is None else _read_labels(node[label_key], f"{url}/{label_key}", missing_chunks)
    found = ZarrImages(images, labels, name=url)
    found.check_missing = missing_chunks == "stop"
    _note_earlier(found, label_key)
    return found


def _read_labels(array: Any, name: str, missing_chunks: str) -> Array:
    try:
        labels = np.asarray(array[...])
        if missing_chunks == "stop" and labels.ndim:
            # Only a chunk that reads as nothing but the fill value can be missing: one of its samples stands for it.
            side = (array.shards or array.chunks)[0]
            starts = np.arange(0, len(labels), side)
            uniform = [at for at in starts if (labels[at : at + side] == array.fill_value).all()]
            chosen = np.array(uniform, dtype=np.int64)
            _check_chunks(array, labels[chosen], chosen, name)
    except DataError:
        raise
    except Exception as error:  # each file system and codec has errors of its own
        raise DataError(f"{name} cannot be read: {error}") from error
    return labels


def _choose(keys: Iterable[str], url: str) -> tuple[str, str | None]:
    """The keys of the images and of their labels among those of a file or group."""
    found = list(keys)
    label = next((key for key in LABELS if key in found), None)
    candidates = [key for key in found if key != label]
    chosen: tuple[str, str | None] | None = None
    if "images" in candidates:
        chosen = "images", label
    elif pair := next((pair for pair in PAIRS if set(pair) <= set(found)), None):
        chosen = pair
    elif len(candidates) == 1:
        chosen = candidates[0], label
    if chosen is None:
        raise DataError(
            f"{url} must hold one array of images, or one named 'images'; it holds: {', '.join(candidates) or 'none'}"
        )
    if over := [key for key in found if key not in chosen]:
        names = ", ".join(over)
        log.warning(
            "data: %s: images are %s, labels are %s; passed over: %s", url, chosen[0], chosen[1] or "not there", names
        )
    return chosen
