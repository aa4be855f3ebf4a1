"""The supported image types, and sources that read batches of images.

An image is [C, H, W], uint8 in 0..255 or floats in [-1, 1]. Users' objects may also return [H, W] (one channel), uint8
[H, W, C] and PIL images; `as_channels_first` converts them to [C, H, W].
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from udddm.data import pictures
from udddm.errors import DataError

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]

COLORS = (1, 3, 4)  # gray, RGB, RGBA: the numbers of channels that distinguish [H, W, C] from [C, H, W]
# Floats may exceed [-1, 1] by this much, and are clamped: the next bfloat16 after 1 is 1.0078.
TOLERANCE = 0.01
LARGEST_CONTENT = 1 << 30
"""Bytes of an array in memory or a memory-mapped file up to which all its samples are compared with a run's."""


class MapDataset(Protocol):
    """Any object of N samples: `dataset[i]` for 0 <= i < N is an image, or a pair (image, integer label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class BatchSource(ABC):
    """A map-style source that reads many samples in one call.

    Subclass it if that is faster than reading one sample at a time. `batch` must be thread-safe. Only subclasses are
    read in batches: in other libraries, a method named `batch` has other meanings.
    """

    classes: int | None = None
    """The number of classes; labels are 0..classes-1. None without labels."""
    class_names: Sequence[str] = ()
    """The names of the classes, if known."""
    earlier_labels: Labels | Literal["same"] | None = "same"
    """The labels of all samples as earlier versions read them, or "same". They identify the data of runs without
    classes that earlier versions started."""

    paired = False
    """Whether `batch` returns conditioning images too, as further C channels."""

    @property
    def labels(self) -> Labels | None:
        """The labels of all samples, int64 [N], or None. If available, they are validated before training starts."""
        return None

    @property
    def in_memory(self) -> bool:
        """Whether the images are in memory or in a memory-mapped file, so that nothing has to be decoded."""
        return False

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples N."""

    def content(self) -> str:
        """A digest of all samples, `<type>:<digest>`, or "" if it takes too long. Unlike types are not compared."""
        return ""

    @abstractmethod
    def batch(self, ids: Ids) -> tuple[Array, Labels | None]:
        """Returns the samples `ids` (int64 [n]): images [n, C, H, W], uint8 or floats in [-1, 1], and labels, int64 [n]
        or None. If `paired`, images are [n, 2 C, H, W]."""

    def __getitem__(self, index: int, /) -> Any:
        """One image [C, H, W], or a tuple of it with its condition [C, H, W], its label, or both."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        images, labels = self.batch(np.array([index], dtype=np.int64))
        parts: list[Any] = np.split(images[0], 2) if self.paired else [images[0]]
        parts += [] if labels is None else [int(labels[0])]
        return tuple(parts) if len(parts) > 1 else parts[0]


class ArrayImages(BatchSource):
    """Images in one array: [N, C, H, W], [N, H, W], or uint8 [N, H, W, C]. Memory-mapped arrays stay on disk.

    Args:
        images: uint8, or floats in [-1, 1].
        labels: integers >= 0, [N], or None.
        classes: the number of classes; default: the largest label plus one.
        name: the name of the array in error messages.

    Raises DataError for any other shape or type.
    """

    def __init__(self, images: Any, labels: Any = None, *, classes: int | None = None, name: str = "the array") -> None:
        self._images = images
        self._name = name
        shape = tuple(int(side) for side in images.shape)
        if len(shape) not in (3, 4):
            raise DataError(
                f"{name} has shape {list(shape)}: give images as [N, C, H, W], [N, H, W] or uint8 [N, H, W, C]"
            )
        check_type(images.dtype, name)
        if 0 in shape:
            raise DataError(f"{name} is empty: its shape is {list(shape)}")
        _check_layout(shape, name)
        self._channels_last = len(shape) == 4 and _is_channels_last(shape[1:], images.dtype, f"an image of {name}")
        self._labels = None if labels is None else check_labels(labels, shape[0], classes, name)
        if self._labels is not None:
            self.classes = classes or int(self._labels.max()) + 1

    def __len__(self) -> int:
        return int(self._images.shape[0])

    @property
    def in_memory(self) -> bool:
        """Whether the images are a NumPy array, which may be memory-mapped."""
        return isinstance(self._images, np.ndarray)

    @property
    def labels(self) -> Labels | None:
        return self._labels

    def batch(self, ids: Ids) -> tuple[Array, Labels | None]:
        rows = self._rows(ids)
        if rows.ndim == 3:
            rows = rows[:, None]
        elif self._channels_last:
            rows = rows.transpose(0, 3, 1, 2)
        return rows, None if self._labels is None else self._labels[ids]

    def content(self) -> str:
        if not isinstance(self._images, np.ndarray) or self._images.nbytes > LARGEST_CONTENT:
            return ""
        integers = self._images.dtype == np.uint8
        digest = hashlib.sha256()
        for first in range(0, len(self), 1024):
            rows, _ = self.batch(np.arange(first, min(first + 1024, len(self))))
            digest.update(np.ascontiguousarray(rows if integers else rows.astype("<f4")).data)
        if self._labels is not None:
            digest.update(np.ascontiguousarray(self._labels, "<i8").data)
        return f"{'uint8' if integers else 'float'}:{digest.hexdigest()}"

    def _rows(self, ids: Ids) -> Array:
        return np.asarray(self._images[ids])


def require_map_style(source: object, name: str) -> None:
    """Raise DataError unless `source` has a length and can be indexed by integers."""
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(type(source), method)]
    if missing:
        raise DataError(
            f"{name} is a {type(source).__name__} without {' and '.join(missing)}: "
            "give a map-style data set, whose samples are dataset[0] to dataset[len(dataset) - 1]"
        )
    if isinstance(source, Mapping | str | bytes):
        raise DataError(f"{name} is a {type(source).__name__}, not a sequence of images or (image, label) pairs")


def split_sample(sample: object, name: str) -> tuple[Any, Any, Any]:
    """Split the result of a user's `__getitem__` into (image, condition, label), of which the last two may be None.

    It is an image, (image, label), (image, condition) or (image, condition, label). Raises DataError.
    """
    if isinstance(sample, Mapping):
        keys = ", ".join(map(repr, sample))
        raise DataError(f"{name} is a mapping with the keys {keys}: __getitem__ must return an image or (image, label)")
    if not isinstance(sample, Sequence) or isinstance(sample, str | bytes):
        return sample, None, None
    if len(sample) not in (1, 2, 3) or (len(sample) == 3 and not _is_image(sample[1])):  # TensorDataset: (image,)
        raise DataError(
            f"{name} is a {type(sample).__name__} of length {len(sample)}: return an image or a pair (image, label), "
            "or (image, condition, label), where the condition is an image"
        )
    if len(sample) > 1 and _is_image(sample[1]):
        return sample[0], sample[1], sample[2] if len(sample) == 3 else None
    return sample[0], None, sample[1] if len(sample) == 2 else None


def _is_image(part: object) -> bool:
    """Whether a part of a sample is an image, not a label."""
    if isinstance(part, np.ndarray | torch.Tensor):
        return part.ndim >= 2
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(part, pil.Image)


def as_channels_first(image: object, name: str) -> Array:
    """Convert a user's image to an array [C, H, W] of the same type. `name` is for error messages (DataError)."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    elif not isinstance(image, np.ndarray):
        return _from_pil(image, name)
    check_type(image.dtype, name)
    if 0 in image.shape or image.ndim not in (2, 3):
        raise DataError(f"{name} has shape {list(image.shape)}: give an image as [C, H, W], [H, W] or uint8 [H, W, C]")
    if image.ndim == 2:
        return image[None]
    return image.transpose(2, 0, 1) if _is_channels_last(image.shape, image.dtype, name) else image


def scaled(rows: Array, ids: Ids) -> npt.NDArray[np.float32]:
    """Convert `rows` [n, C, H, W] to a new float32 array in [-1, 1]. uint8 becomes value / 127.5 - 1.

    Raises DataError, which names the sample (one of `ids`, int64 [n]), for NaN, infinity or a float out of range.
    """
    check_type(rows.dtype, "the batch")
    out = np.empty(rows.shape, dtype=np.float32)  # C order, for any strides of `rows`
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is reported below
        np.copyto(out, rows, casting="same_kind")
    if rows.dtype == np.uint8:
        out /= 127.5
        out -= 1
        return out
    if out.size == 0:
        return out
    low, high = float(out.min()), float(out.max())  # NaN if any value is
    if not (low >= -1 - TOLERANCE and high <= 1 + TOLERANCE):
        flat = out.reshape(len(out), -1)
        worst = int(np.argmin(((flat >= -1 - TOLERANCE) & (flat <= 1 + TOLERANCE)).all(axis=1)))
        first, last = float(flat[worst].min()), float(flat[worst].max())
        if not np.isfinite([first, last]).all():
            raise DataError(f"sample {ids[worst]} contains NaN or infinite values: remove or repair it")
        raise DataError(
            f"sample {ids[worst]} has values in [{first:g}, {last:g}]: scale float images to [-1, 1], or give "
            "uint8 in 0..255"
        )
    if low < -1 or high > 1:
        np.clip(out, -1, 1, out=out)
    return out


def check_type(dtype: np.dtype[Any], name: str) -> None:
    """Raise DataError unless `dtype` is uint8 or a float of up to 8 bytes."""
    if dtype != np.uint8 and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise DataError(f"{name} has dtype {dtype}: give uint8 in 0..255 or floats in [-1, 1]")


def check_labels(labels: Any, length: int, classes: int | None, name: str, remedy: str = "") -> Labels:
    """Returns labels as int64 [length], each in 0..classes-1. Raises DataError for the labels of `name`.

    `remedy` is another way to correct a label that is too large.
    """
    array = np.asarray(labels)
    if array.shape != (length,):
        raise DataError(
            f"the labels of {name} have shape {list(array.shape)}, but there are {length} images: give [{length}]"
        )
    if array.dtype.kind not in "iu":
        raise DataError(f"the labels of {name} have dtype {array.dtype}: give integers >= 0")
    if array.max() > np.iinfo(np.int64).max or array.min() < 0 or (classes is not None and array.max() >= classes):
        allowed = ">= 0" if classes is None else f"from 0 to {classes - 1}{remedy}"
        raise DataError(f"the labels of {name} are in {array.min()}..{array.max()}: give integers {allowed}")
    return array.astype(np.int64)


def format_shape(shape: Sequence[int]) -> str:
    """Format a shape, such as 3x32x32."""
    return "x".join(str(side) for side in shape)


def _is_channels_last(shape: Sequence[int], dtype: np.dtype[Any], name: str) -> bool:
    """Whether a three-dimensional image is [H, W, C]. Raises DataError if that is ambiguous.

    [16, 4, 4] is a latent with 16 channels, not an image with a width of four pixels.
    """
    first, middle, last = shape
    doubtful = last == 2 and first not in COLORS and middle > 2  # gray and alpha, or two channels of a microscope image
    doubtful |= last in COLORS and first in COLORS and first == middle != last  # [4, 4, 3]
    if doubtful:
        raise DataError(
            f"{name} has shape {list(shape)}, which may be {first} channels of {middle}x{last} or {last} channels of "
            f"{first}x{middle}: give images as [C, H, W]" + (" (or with 1, 3 or 4 channels)" if last == 2 else "")
        )
    looks_so = last in COLORS and first not in COLORS and middle != last
    if looks_so and dtype != np.uint8:
        raise DataError(f"{name} has shape {list(shape)}: give float images as [C, H, W]")
    return looks_so


def _check_layout(shape: Sequence[int], name: str) -> None:
    """Raise DataError for an array that looks like a single image, or that has the samples along the last axis."""
    if len(shape) == 3 and shape[2] <= 4 and shape[1] > shape[2]:
        raise DataError(
            f"{name} has shape {list(shape)}, which looks like one image [H, W, C]: give images as [N, C, H, W] or "
            "uint8 [N, H, W, C]"
        )
    if len(shape) == 4 and shape[1] not in COLORS and shape[3] > max(shape[0], 4 * shape[2]):
        raise DataError(
            f"{name} has shape {list(shape)}, which looks like samples along the last axis: give images as "
            "[N, C, H, W] or uint8 [N, H, W, C], for example with numpy.moveaxis(images, -1, 0)"
        )


def _from_pil(image: object, name: str) -> Array:
    pil = sys.modules.get("PIL.Image")  # a PIL image can only exist once PIL has been imported
    if pil is None or not isinstance(image, pil.Image):
        raise DataError(f"{name} is a {type(image).__name__}: give a torch tensor, a numpy array or a PIL image")
    return pictures.pixels(pictures.shown(image, gray=pictures.is_gray(image), name=name))
