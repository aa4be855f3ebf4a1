"""A data set of the image files in a folder."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from udddm.data import folder_labels, pictures
from udddm.data.images import Array, BatchSource, Ids, Labels, format_shape
from udddm.errors import DataError

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_IMAGES = re.compile(
    r"\.(avif|dng|exr|gif|gz|hdr|hei[cf]|jfif|jp2|jpe|jxl|np[yz]|p[bgnp]m|psd|svg|tar|tga|tiff?|zip)", re.IGNORECASE
)
"""Files that may be images but are not read here. A warning reports their number."""


class FolderImages(BatchSource):
    """All PNG, JPEG, WebP and BMP files below `root`, sorted by relative path, as uint8 [C, H, W].

    C is 1 if all files are gray, otherwise 3. Images are read as a viewer shows them: rotated according to EXIF, with
    transparent parts on white. Hidden files are skipped, and a warning counts files of other image formats.

    Labels are read from `dataset.json` in `root`, in the format of dataset_tool.py of EDM and StyleGAN:
    `{"labels": [["00000/img00000000.png", 7], ...]}`. Without that file, if every image is in a direct subdirectory of
    `root`, the sorted names of the subdirectories are the classes, except numbered directories of a thousand files each
    (00000, 01000, ...).

    `size` (pixels) crops each image to its central square and resizes it to `size` x `size` (Lanczos). Without it, all
    images must have the same shape, which is checked here from the headers. Pixels are decoded at each access, so a
    large data set is faster as an array (`name: array`).

    Raises DataError for a folder that is missing or has no images, a directory that cannot be listed, a class without
    images, an unreadable header, more than 8 bits per channel, or two files of different shape. `batch` raises
    DataError for a corrupt file. Each error names the file.
    """

    def __init__(self, root: Path, size: int | None = None) -> None:
        if root.is_file():
            raise DataError(
                f"{root} is a file, not a folder: unpack it, and set data.path to the folder with the images"
            )
        if not root.is_dir():
            raise DataError(f"{root} is not a local directory: data.path must be the folder with the images")
        if importlib.util.find_spec("PIL") is None:
            raise DataError(f"reading the image files in {root} needs Pillow: pip install 'udddm[images]'")
        self.files, others = _find(root)
        counted = Counter(file.suffix.lower() for file in others if OTHER_IMAGES.fullmatch(file.suffix))
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counted.items()))
        if not self.files:
            there = f" (there are: {kinds})" if kinds else ""
            raise DataError(f"{root} contains no images: none of its files ends in {', '.join(SUFFIXES)}{there}")
        if kinds:
            log.warning(
                "data: %s: %d files are ignored: %s; only %s are read. Convert them to PNG to train on them",
                root, counted.total(), kinds, ", ".join(SUFFIXES),
            )  # fmt: skip
        self._root = root
        self._size = size
        self._gray, (width, height) = self._check_headers()
        self._shape = (1 if self._gray else 3, size or height, size or width)
        found = folder_labels.find(root, self.files, others)
        self._labels, self.class_names, self.classes = found.labels, found.class_names, found.classes
        if found.differs:
            self.earlier_labels = folder_labels.of_directories(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Labels | None:
        return self._labels

    def batch(self, ids: Ids) -> tuple[Array, Labels | None]:
        images = np.empty((len(ids), *self._shape), dtype=np.uint8)
        for row, index in enumerate(ids.tolist()):
            images[row] = self._read(self._root / self.files[index])
        return images, None if self._labels is None else self._labels[ids]

    def _check_headers(self) -> tuple[bool, tuple[int, int]]:
        """Returns whether all files are gray, and the width and height of the first. Only headers are read."""
        from PIL import Image
        from tqdm import tqdm

        gray = True
        first: tuple[int, int] | None = None
        with tqdm(self.files, desc="image headers", unit="file", disable=None, delay=2) as files:
            for file in files:
                try:
                    with (self._root / file).open("rb") as opened, Image.open(opened) as image:
                        pictures.check_depth(image, str(self._root / file))
                        gray = gray and pictures.is_gray(image)
                        shape = image.size if self._size else pictures.shown_size(image, opened)
                except DataError:
                    raise
                except Exception as error:
                    raise _unreadable(self._root / file, error) from error
                first = first or shape
                if self._size is None and shape != first:
                    raise DataError(
                        f"{self._root / file} is {format_shape(shape)} (width x height), "
                        f"but {self._root / self.files[0]} is {format_shape(first)}: "
                        "give all images the same size, or set data.size to resize them"
                    )
        assert first is not None  # there is at least one file
        return gray, first

    def _read(self, file: Path) -> Array:
        from PIL import Image

        try:
            with Image.open(file) as image:
                pixels = pictures.pixels(self._fit(pictures.shown(image, gray=self._gray, name=str(file))))
        except DataError:
            raise
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, zlib.error and others
            raise _unreadable(file, error) from error
        if pixels.shape != self._shape:
            raise DataError(
                f"{file} is now {format_shape(pixels.shape)}, but was {format_shape(self._shape)} at the start"
            )
        return pixels

    def _fit(self, image: Any) -> Any:
        from PIL import Image

        if self._size is None or image.size == (self._size, self._size):
            return image
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return square.resize((self._size, self._size), Image.Resampling.LANCZOS)


def _find(root: Path) -> tuple[list[Path], list[Path]]:
    """Returns the image files and all other files below `root`, relative to it.

    Links to directories are followed, each directory once. Hidden files and directories are skipped. Raises DataError
    for a directory that cannot be listed.
    """
    images: list[Path] = []
    others: list[Path] = []
    seen = set()

    def refuse(error: OSError) -> None:
        raise DataError(
            f"the directory {error.filename} cannot be listed ({error.strerror}), so its images would be missing. Make "
            "it readable, or move it out of the data set"
        ) from error

    for place, directories, names in os.walk(root, followlinks=True, onerror=refuse):
        here = Path(place)
        if here.resolve() in seen:  # a link to a parent directory, which would recurse forever
            directories.clear()
            continue
        seen.add(here.resolve())
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                (images if name.lower().endswith(SUFFIXES) else others).append((here / name).relative_to(root))
    return sorted(images, key=lambda file: file.as_posix()), others


def _unreadable(file: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{file} no longer exists: restore it, or start a new run")
    return DataError(f"cannot read {file} as an image ({error}): repair or remove it")
