"""The pictures of a data set one by one, whatever their sizes, for tools that do not need a training batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from udddm.config import DataConfig
from udddm.data import ArrayImages, pictures
from udddm.data.encoded import ImageFiles, decode
from udddm.data.images import Labels
from udddm.data.loading import FILES, load_dataset, open_files
from udddm.errors import DataError

T = TypeVar("T")
U = TypeVar("U")

AHEAD = 64
"""Items that `in_parallel` works on at a time."""


class Pictures(Protocol):
    """Pictures by index, with labels."""

    labels: Labels | None
    """int64 [N], or None."""
    class_names: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of a picture, for messages."""

    def picture(self, index: int, *, gray: bool) -> Any:
        """A PIL image of mode L or RGB. Raises DataError."""

    def is_gray(self) -> bool:
        """Whether all pictures are gray. Raises DataError, which names the file."""

    def bytes_of(self, index: int) -> bytes:
        """What identifies a picture: its file, or its pixels."""


class FilePictures:
    """The pictures in image files."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files
        self.labels, self.class_names = files.found.labels, files.found.class_names

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files.name(index)

    def picture(self, index: int, *, gray: bool) -> Any:
        return decode(self.files.read(index), self.name(index), gray=gray)

    def is_gray(self) -> bool:
        grays = [header.gray for header in self.files.headers()]  # all are read, so that a damaged one is reported now
        return all(grays)

    def bytes_of(self, index: int) -> bytes:
        return self.files.read(index)


class ArrayPictures:
    """The pictures in an array uint8 [N, C, H, W], C = 1 or 3."""

    def __init__(self, images: ArrayImages, where: str) -> None:
        first = images.batch(np.zeros(1, np.int64))[0]
        if first.dtype != np.uint8 or first.shape[1] not in (1, 3):
            raise DataError(
                f"{where} has images of type {first.dtype} with {first.shape[1]} channels: only gray or RGB images in "
                "uint8 can be resized"
            )
        self._images, self._where, self._channels = images, where, first.shape[1]
        self.labels, self.class_names = images.labels, list(images.class_names)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"sample {index} of {self._where}"

    def picture(self, index: int, *, gray: bool) -> Any:
        from PIL import Image

        pixels = self._images.batch(np.array([index]))[0][0]
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return pictures.shown(image, gray=gray, name=self.name(index))

    def is_gray(self) -> bool:
        return bool(self._channels == 1)

    def bytes_of(self, index: int) -> bytes:
        return self._images.batch(np.array([index]))[0].tobytes()


def open_pictures(config: DataConfig) -> Pictures:
    """The pictures of a data set. Raises ConfigError and DataError."""
    if config.name in FILES:
        return FilePictures(open_files(config))
    dataset = load_dataset(config)
    if not isinstance(dataset, ArrayImages):
        raise DataError(f"{config.name}: only data sets in files can be resized")
    return ArrayPictures(dataset, config.path or config.name)


def digest_of(source: Pictures) -> str:
    """A digest of the number, names and labels of all pictures, and of the contents of 16 evenly spaced ones."""
    digest = hashlib.sha256(f"{len(source)}".encode())
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape") + b"\0")
    if source.labels is not None:
        digest.update(source.labels.astype("<i8").tobytes())
    for index in np.unique(np.linspace(0, len(source) - 1, 16).astype(np.int64)).tolist():
        digest.update(source.bytes_of(index))
    return digest.hexdigest()


def in_parallel(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """`map` in several threads, in order, with at most AHEAD items at a time. Pillow works in parallel in them."""
    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(remaining, AHEAD)):
            yield from pool.map(function, some)
