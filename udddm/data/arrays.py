"""Images in one stored array: .npy, .npz or Zarr, on a local disk or at any fsspec URL."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from udddm.data.images import Array, ArrayImages, BatchSource, Ids
from udddm.data.pairs import PairedImages
from udddm.errors import DataError
from udddm.files import expanded

log = logging.getLogger(__name__)


class ZarrImages(ArrayImages):
    """Images in a Zarr array. Each batch reads the chunks that contain its samples; nothing is cached.

    In the worst case, a batch in random order reads one chunk per sample. For fast random access, use chunks of a few
    samples, or a local .npy file, which is memory-mapped.
    """

    check_missing = True
    """Whether a missing chunk is an error; see `data.missing_chunks`."""

    def _rows(self, ids: Ids) -> Array:
        # With sorted, unique ids, each chunk is read and decoded once per batch.
        unique, inverse = np.unique(ids, return_inverse=True)
        try:
            rows = np.asarray(self._images.oindex[unique])
            if self.check_missing:
                _check_chunks(self._images, rows, unique, self._name)
        except DataError:
            raise
        except Exception as error:  # the errors differ between file systems and codecs
            message = f"cannot read samples {ids.min()}..{ids.max()} of {self._name}: {error}"
            raise DataError(message) from error
        return rows[inverse]


def _check_chunks(array: Any, rows: Array, ids: Ids, name: str) -> None:
    """Raise DataError if rows of a Zarr array contain the fill value because their chunk is missing.

    Zarr reads a missing chunk as its fill value. `rows` are the samples `ids` as read from the array. Only chunks whose
    part of the rows is entirely the fill value are looked up in the store, so the check costs one request for a black
    image, and none otherwise.
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
                    f"reads as {fill}. Copy the array again; or, if its writer omitted chunks that contain only "
                    f"{fill}, as Zarr does by default, set data.missing_chunks=fill"
                )


def _is_stored(array: Any, chunk: tuple[int, ...]) -> bool:
    from zarr.core.sync import sync

    return bool(sync((array.store_path / array.metadata.encode_chunk_key(chunk)).exists()))


LABELS = ("labels", "label", "y", "targets", "target")
"""Names of the labels in a .npz file or Zarr group, in the order of the search."""
PAIRS = (("arr_0", "arr_1"), ("x_train", "y_train"), ("train_images", "train_labels"))
"""Names of images and labels in files of guided-diffusion and EDM, Keras, and MedMNIST."""


CONDITIONS = "conditions"
"""Name of the conditioning images in a .npz file or Zarr group of pairs."""


def open_array(
    url: str, *, missing_chunks: Literal["stop", "fill"] = "stop", conditions: str | None = None
) -> BatchSource:
    """Open the images at `url`, a path or an fsspec URL: a .npy or .npz file, or otherwise a Zarr array or group.

    Images are uint8 or floats in [-1, 1] of shape [N, C, H, W] or [N, H, W], or uint8 [N, H, W, C]. In a .npz file or
    Zarr group, they are the array `images` or the only array, with optional labels (integers, [N]) under one of the
    names LABELS; or images and labels have the names of one of PAIRS. A warning names the arrays that are ignored. A
    local .npy file is memory-mapped, and Zarr is read on demand; .npz and remote .npy files are read into memory.
    Pickles are rejected.

    `missing_chunks` sets the meaning of a missing chunk of a Zarr array: corruption ("stop"), or a chunk that contains
    only the fill value ("fill").

    `conditions` is the name of the conditioning images in a .npz file or Zarr group: the data set is then paired.

    Raises DataError if nothing exists at `url`, or if it is corrupt or does not contain images. Reading a batch raises
    DataError for a missing chunk.
    """
    url = url.removeprefix("file://")
    remote = "://" in url or "::" in url
    suffix = Path(url.rstrip("/")).suffix.lower()
    if not remote:
        url = str(expanded(url))
        if not Path(url).exists():
            raise DataError(f"{url} does not exist: data.path must be a .npy or .npz file or a Zarr array")
    if suffix == ".npy" and conditions is not None:
        raise DataError(f"{url} has images only: set data.condition.path to the array of their conditioning images")
    if suffix == ".npy":
        return _open_npy(url, remote=remote)
    if suffix == ".npz":
        return _open_npz(url, conditions, remote=remote)
    return _open_zarr(url, missing_chunks, conditions)


def _paired(found: ArrayImages, conditions: ArrayImages | None, url: str, key: str | None) -> BatchSource:
    return found if conditions is None else PairedImages(found, conditions, (url, f"{url}, array {key},"))


def _open_npy(url: str, *, remote: bool) -> ArrayImages:
    try:
        if remote:
            images = np.lib.format.read_array(io.BytesIO(_read_all(url)), allow_pickle=False)
        else:
            images = np.lib.format.open_memmap(url, mode="r")  # never unpickles
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {url} as a .npy file: {error}") from error
    return ArrayImages(images, name=url)


def _open_npz(url: str, conditions: str | None, *, remote: bool) -> BatchSource:
    try:
        # Opened here, because numpy does not close a corrupt file that it opened by name.
        with (
            io.BytesIO(_read_all(url)) if remote else Path(url).open("rb") as file,
            np.lib.npyio.NpzFile(file, allow_pickle=False) as archive,
        ):
            image_key, label_key = _choose(archive.files, url, conditions)
            images = archive[image_key]
            labels = None if label_key is None else archive[label_key]
            others = None if conditions is None else archive[conditions]
    except DataError:
        raise
    except Exception as error:  # zip files fail in many ways: BadZipFile, zlib.error, EOFError, NotImplementedError ...
        raise DataError(f"cannot read {url} as a .npz file: {error}") from error
    found = ArrayImages(images, labels, name=url)
    _note_earlier(found, label_key)
    return _paired(found, None if others is None else ArrayImages(others, name=f"{url}/{conditions}"), url, conditions)


def _note_earlier(found: ArrayImages, label_key: str | None) -> None:
    """Record that earlier versions read no labels here: they knew only the name `labels`."""
    if label_key not in (None, "labels"):
        found.earlier_labels = None


def _read_all(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
    except FileNotFoundError as error:
        raise DataError(f"nothing exists at {url}") from error
    except Exception as error:  # the errors differ between file systems
        raise DataError(f"cannot read {url}: {error}") from error
    return content


def _open_zarr(url: str, missing_chunks: str, conditions: str | None) -> BatchSource:
    import zarr

    try:
        node = zarr.open(url, mode="r")
    except FileNotFoundError as error:  # the base class of zarr's errors for a missing node
        raise DataError(
            f"{url} is not a Zarr array or group (the name of a NumPy file must end in .npy or .npz)"
        ) from error
    except Exception as error:
        raise DataError(f"cannot open {url} as Zarr: {error}") from error
    if isinstance(node, zarr.Array):
        if conditions is not None:
            raise DataError(f"{url} has images only: set data.condition.path to the array of their conditioning images")
        single = ZarrImages(node, None, name=url)
        single.check_missing = missing_chunks == "stop"
        return single
    image_key, label_key = _choose(node.array_keys(), url, conditions)
    images = node[image_key]
    labels = None if label_key is None else _read_labels(node[label_key], f"{url}/{label_key}", missing_chunks)
    found = ZarrImages(images, labels, name=url)
    found.check_missing = missing_chunks == "stop"
    names = node.attrs.get("class_names")
    if found.classes and isinstance(names, list) and len(names) >= found.classes:
        found.class_names, found.classes = [str(name) for name in names], len(names)
    _note_earlier(found, label_key)
    if conditions is None:
        return found
    others = ZarrImages(node[conditions], name=f"{url}/{conditions}")
    others.check_missing = found.check_missing
    return _paired(found, others, url, conditions)


def _read_labels(array: Any, name: str, missing_chunks: str) -> Array:
    try:
        labels = np.asarray(array[...])
        if missing_chunks == "stop" and labels.ndim:
            # Only a chunk that reads as entirely the fill value can be missing; one sample per such chunk is checked.
            side = (array.shards or array.chunks)[0]
            starts = np.arange(0, len(labels), side)
            uniform = [at for at in starts if (labels[at : at + side] == array.fill_value).all()]
            chosen = np.array(uniform, dtype=np.int64)
            _check_chunks(array, labels[chosen], chosen, name)
    except DataError:
        raise
    except Exception as error:  # the errors differ between file systems and codecs
        raise DataError(f"cannot read {name}: {error}") from error
    return labels


def _choose(keys: Iterable[str], url: str, conditions: str | None = None) -> tuple[str, str | None]:
    """The keys of the images and of their labels (None without labels) in a file or group.

    `conditions` is the key of the conditioning images, which must be there. Raises DataError.
    """
    found = list(keys)
    if conditions is not None and conditions not in found:
        raise DataError(
            f"{url} has no array {conditions!r} of conditioning images; it has: {', '.join(found) or 'none'}. Set "
            "data.condition.image to one of them, or data.condition.path to another file"
        )
    found = [key for key in found if key != conditions]
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
            f"{url} must contain one array of images, or one named 'images'; it has: {', '.join(candidates) or 'none'}"
        )
    if over := [key for key in found if key not in chosen]:
        names = ", ".join(over)
        log.warning(
            "data: %s: images are %s, labels are %s; ignored: %s", url, chosen[0], chosen[1] or "missing", names
        )
    return chosen
