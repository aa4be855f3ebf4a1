"""A folder of image files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from udddm.data.images import (
    GRAY_MODES,
    Array,
    BatchSource,
    Ids,
    Labels,
    check_depth,
    format_shape,
    pil_pixels,
    to_gray_or_rgb,
)
from udddm.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class FolderImages(BatchSource):
    """All PNG, JPEG, WebP and BMP files below `root`, in the order of their relative paths; uint8 [C, H, W].

    C is 1 if all files are gray, else 3; an alpha channel is dropped and EXIF rotation is not applied. If every file
    lies in a sub-directory of `root` itself, the sorted names of these are the classes and give the labels. Hidden
    files are left out.

    `size` (pixels) crops each image to its central square and resizes it to `size` x `size` (Lanczos); without it all
    must agree in shape. That is checked here from the headers alone; the pixels are decoded at each access, so a
    large data set is read faster as an array (`name: array`).

    Raises DataError for a folder that is missing or has no images, an unreadable header, more than 8 bits a channel, or
    two files of different shape; `batch` raises it for a damaged file. Each error names the file.
    """

    def __init__(self, root: Path, size: int | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is not a local directory: data.path must be the folder with the images")
        if importlib.util.find_spec("PIL") is None:
            raise DataError(f"reading the image files in {root} needs Pillow: pip install 'udddm[images]'")
        self.files = _find(root)
        if not self.files:
            raise DataError(f"{root} holds no image: none of its files ends in {', '.join(SUFFIXES)}")
        self._root = root
        self._size = size
        self._gray, (width, height) = self._check_headers()
        self._shape = (1 if self._gray else 3, size or height, size or width)
        self._labels: Labels | None = None
        self.class_names: list[str] = []
        if all(len(file.parts) == 2 for file in self.files):
            self.class_names = sorted({file.parts[0] for file in self.files})
            self.classes = len(self.class_names)
            numbers = {name: number for number, name in enumerate(self.class_names)}
            self._labels = np.array([numbers[file.parts[0]] for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, ids: Ids) -> tuple[Array, Labels | None]:
        images = np.empty((len(ids), *self._shape), dtype=np.uint8)
        for row, index in enumerate(ids.tolist()):
            images[row] = self._read(self._root / self.files[index])
        return images, None if self._labels is None else self._labels[ids]

    def _check_headers(self) -> tuple[bool, tuple[int, int]]:
        """Whether all files are gray, and the width and height of the first: opening a file reads but its header."""
        from PIL import Image
        from tqdm import tqdm

        gray = True
        first: tuple[int, int] | None = None
        with tqdm(self.files, desc="image headers", unit="file", disable=None, delay=2) as files:
            for file in files:
                try:
                    with Image.open(self._root / file) as image:
                        mode, shape = image.mode, image.size
                except Exception as error:
                    raise _unreadable(self._root / file, error) from error
                check_depth(mode, str(self._root / file))
                gray = gray and mode in GRAY_MODES
                first = first or shape
                if self._size is None and shape != first:
                    raise DataError(
                        f"{self._root / file} is {format_shape(shape)} (width x height), "
                        f"but {self._root / self.files[0]} is {format_shape(first)}: "
                        "make them agree, or set data.size to resize all"
                    )
        assert first is not None  # there is a file
        return gray, first

    def _read(self, file: Path) -> Array:
        from PIL import Image

        try:
            with Image.open(file) as image:
                pixels = pil_pixels(self._fit(to_gray_or_rgb(image, gray=self._gray, name=str(file))))
        except DataError:
            raise
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, zlib.error and others
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


def _find(root: Path) -> list[Path]:
    """Image files below `root`, relative to it. Links to directories are followed, each directory once."""
    files = []
    seen = set()
    for place, directories, names in os.walk(root, followlinks=True):
        here = Path(place)
        if here.resolve() in seen:  # a link back up, which would never end
            directories.clear()
            continue
        seen.add(here.resolve())
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                files.append((here / name).relative_to(root))
    return sorted(files, key=lambda file: file.as_posix())


def _unreadable(file: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{file} has vanished: bring it back, or start a new run")
    return DataError(f"{file} cannot be read as an image ({error}): repair or remove it")
