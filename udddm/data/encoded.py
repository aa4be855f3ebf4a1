"""Images in image files, decoded at each access: what folders, archives, shards and tables of files have in common."""

from __future__ import annotations

import importlib.util
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np

from udddm.data import pictures
from udddm.data.folder_labels import FolderLabels
from udddm.data.images import Array, BatchSource, Ids, Labels, format_shape
from udddm.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LARGEST_FILE = 256 << 20
"""Bytes of one image file in an archive. Larger ones are refused, because they are read into memory."""
PREFIX = 64 << 10
"""Bytes at the start of a file in which its header is searched first."""
REQUESTS = 16
"""Headers that are read at the same time from a remote file system."""


@dataclass(frozen=True)
class Header:
    """What is known of an image without its pixels. Width and height are those shown, after an EXIF rotation."""

    width: int
    height: int
    gray: bool


class ImageFiles(ABC):
    """Image files in a fixed order, from one place. Thread-safe and picklable.

    Reading raises DataError, which names the file.
    """

    where: str
    """The place, in messages."""
    found: FolderLabels
    """The labels of the files."""
    earlier_labels: Labels | Literal["same"] | None = "same"
    """As in BatchSource."""
    remote = False
    """Whether each read is a request to a server."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of files."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The complete name of a file, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The contents of a file."""

    def relative(self, index: int) -> str | None:
        """The name of a file within the place, with `/`. None if files are known by their numbers only."""
        return None

    def prefix(self, index: int) -> bytes:
        """The first PREFIX bytes of a file, or all of it."""
        return self.read(index)

    def header(self, index: int) -> Header:
        """The header of a file. Raises DataError if it cannot be read, or for more than 8 bits per channel."""
        start = self.prefix(index)
        if len(start) == PREFIX:
            try:
                return read_header(io.BytesIO(start), self.name(index), complete=False)
            except DataError:  # also for a header that is longer
                start = self.read(index)
        return read_header(io.BytesIO(start), self.name(index))

    def headers(self) -> Iterator[Header]:
        """The headers of all files, in order. Raises DataError as `header` does."""
        if not self.remote:
            yield from (self.header(index) for index in range(len(self)))
            return
        with ThreadPoolExecutor(REQUESTS) as pool:
            yield from pool.map(self.header, range(len(self)))


def require_pillow(where: str) -> None:
    """Raise DataError unless Pillow is installed."""
    if importlib.util.find_spec("PIL") is None:
        raise DataError(f"reading the image files in {where} needs Pillow: pip install 'udddm[images]'")


def read_header(file: IO[bytes], name: str, *, complete: bool = True, rotated: bool = True) -> Header:
    """The header of an image file. Raises DataError.

    `complete` is whether `file` has more than the first bytes. Without `rotated`, width and height are those stored,
    for which the end of the file is not needed.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=pictures.FORMATS) as image:
            pictures.check_depth(image, name)
            if rotated and not complete and image.format == "PNG" and image.width != image.height:
                raise DataError(f"{name}: its orientation may be at the end of the file")
            width, height = pictures.shown_size(image, file) if rotated else image.size
            return Header(width, height, pictures.is_gray(image))
    except DataError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, zlib.error and others
        raise unreadable(name, error) from error


def decode(data: bytes, name: str, *, gray: bool) -> Any:
    """The PIL image in a file as a viewer shows it, in mode L or RGB. Raises DataError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=pictures.FORMATS) as image:
            return pictures.shown(image, gray=gray, name=name)
    except DataError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, zlib.error and others
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> DataError:
    """The error for a file that is not a valid image."""
    return DataError(f"cannot read {name} as an image ({error}): repair or remove it")


class EncodedImages(BatchSource):
    """The images in `files`, as uint8 [C, H, W].

    C is 1 if all files are gray, otherwise 3. Images are read as a viewer shows them: rotated according to EXIF, with
    transparent parts on white. `size` (pixels) crops each image to its central square and resizes it to `size` x `size`
    (Lanczos). Without it, all images must have the same shape, which is checked here from the headers.

    Raises DataError for an unreadable header, more than 8 bits per channel, or two files of different shape. `batch`
    raises DataError for a corrupt file. Each error names the file.
    """

    def __init__(self, files: ImageFiles, size: int | None = None) -> None:
        self._files = files
        self._size = size
        self._gray, (width, height) = self._check_headers()
        self._shape = (1 if self._gray else 3, size or height, size or width)
        self._labels, self.class_names, self.classes = files.found.labels, files.found.class_names, files.found.classes
        self.earlier_labels = files.earlier_labels

    def __len__(self) -> int:
        return len(self._files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self._shape

    def name(self, index: int) -> str:
        """The complete name of a file, for messages."""
        return self._files.name(index)

    @property
    def labels(self) -> Labels | None:
        return self._labels

    def batch(self, ids: Ids) -> tuple[Array, Labels | None]:
        images = np.empty((len(ids), *self._shape), dtype=np.uint8)
        for row, index in enumerate(ids.tolist()):
            images[row] = self._read(index)
        return images, None if self._labels is None else self._labels[ids]

    def _check_headers(self) -> tuple[bool, tuple[int, int]]:
        """Returns whether all files are gray, and the width and height of the first. Only headers are read."""
        from tqdm import tqdm

        gray = True
        first: tuple[int, int] | None = None
        headers = self._headers()
        with tqdm(headers, total=len(self), desc="image headers", unit="file", disable=None, delay=2) as bar:
            for index, header in enumerate(bar):
                gray = gray and header.gray
                shape = header.width, header.height
                first = first or shape
                if self._size is None and shape != first:
                    raise DataError(
                        f"{self._files.name(index)} is {format_shape(shape)} (width x height), "
                        f"but {self._files.name(0)} is {format_shape(first)}: "
                        "give all images the same size, or set data.size to resize them"
                    )
        assert first is not None  # there is at least one file
        return gray, first

    def _headers(self) -> Iterator[Header]:
        return self._files.headers()

    def _read(self, index: int) -> Array:
        name = self._files.name(index)
        image = decode(self._files.read(index), name, gray=self._gray)
        if self._size is not None:
            image = pictures.central_square(image, self._size)
        pixels = pictures.pixels(image)
        if pixels.shape != self._shape:
            raise DataError(
                f"{name} is now {format_shape(pixels.shape)}, but was {format_shape(self._shape)} at the start"
            )
        return pixels
