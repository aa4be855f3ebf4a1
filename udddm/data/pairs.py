"""Paired data sets: images with a conditioning image each, from two places or from two parts of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from udddm.data.encoded import EncodedImages, Header, ImageFiles
from udddm.data.folder_labels import FolderLabels
from udddm.data.images import Array, BatchSource, Ids, Labels, format_shape, scaled
from udddm.errors import DataError


class MatchedFiles(ImageFiles):
    """The files of `conditions` in the order of those of `images`, without labels.

    Files belong together if their names relative to their places are equal except for the extension. Files of a place
    whose files have no such names (`ImageFiles.relative`) are matched by their numbers.

    Raises DataError, which names a file, for one without a partner, and for two that differ only in the extension.
    """

    def __init__(self, images: ImageFiles, conditions: ImageFiles) -> None:
        self._files, self.where, self.remote = conditions, conditions.where, conditions.remote
        self.found = FolderLabels()
        wanted, there = _by_name(images), _by_name(conditions)
        for files, others, mine, theirs, what in (
            (images, conditions, wanted, there, "conditioning image"),
            (conditions, images, there, wanted, "image"),
        ):
            if missing := [index for name, index in mine.items() if name not in theirs]:
                more = f" and {len(missing) - 1} other files" if missing[1:] else ""
                raise DataError(
                    f"{others.where} has no {what} for {files.name(missing[0])}{more}: the names of a pair must be "
                    "equal apart from the extension; add what is missing, or move files without a partner away"
                )
        self._rows = np.array([there[name] for name in wanted], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._files.name(int(self._rows[index]))

    def read(self, index: int) -> bytes:
        return self._files.read(int(self._rows[index]))

    def prefix(self, index: int) -> bytes:
        return self._files.prefix(int(self._rows[index]))

    def header(self, index: int) -> Header:
        return self._files.header(int(self._rows[index]))

    def headers(self) -> Iterator[Header]:
        if np.array_equal(self._rows, np.arange(len(self._files))):
            return self._files.headers()  # which may know them without a file
        return super().headers()


def _by_name(files: ImageFiles) -> dict[str, int]:
    """The number of each file by its name without the extension."""
    found: dict[str, int] = {}
    for index in range(len(files)):
        relative = files.relative(index)
        name = str(index) if relative is None else PurePosixPath(relative).with_suffix("").as_posix()
        if name in found:
            raise DataError(
                f"{files.name(found[name])} and {files.name(index)} differ only in their extensions: it is ambiguous "
                "which belongs to a pair; rename or remove one"
            )
        found[name] = index
    return found


class ConditionFiles(EncodedImages):
    """The conditioning images of `images`, read as those are: gray or RGB, with the same `size`.

    Raises DataError, which names both files, for an image of another size than its partner (without `size`), and for
    one in color whose partner is gray.
    """

    def __init__(self, files: ImageFiles, images: EncodedImages, size: int | None = None) -> None:
        self._images = images
        super().__init__(files, size)

    def _check_headers(self) -> tuple[bool, tuple[int, int]]:
        channels, height, width = self._images.shape
        for index, header in enumerate(self._headers()):
            pair = f"{self._files.name(index)} and {self._images.name(index)}"
            if self._size is None and (header.width, header.height) != (width, height):
                raise DataError(
                    f"{pair} belong together, but the conditioning image is {header.width}x{header.height} (width x "
                    f"height) and the image {width}x{height}: give both the same size, or set data.size to resize them"
                )
            if channels == 1 and not header.gray:
                raise DataError(
                    f"{pair} belong together, but the conditioning image has color and all images are gray: convert "
                    "one of the two, so that both have the same number of channels"
                )
        return channels == 1, (width, height)


class PairedImages(BatchSource):
    """Images with their conditioning images, from two sources of equal length and shape.

    `batch` returns [n, 2 C, H, W], of which the last C channels are the conditioning images, and the labels of
    `images`. `names` are those of the two sources in messages. Raises DataError if their lengths or shapes differ.
    """

    paired = True

    def __init__(self, images: BatchSource, conditions: BatchSource, names: tuple[str, str]) -> None:
        self._images, self._conditions = images, conditions
        if len(images) != len(conditions):
            raise DataError(
                f"{names[0]} has {len(images)} images and {names[1]} {len(conditions)} conditioning images: give each "
                "image one, in the same order"
            )
        first = np.zeros(1, np.int64)
        shape, given = (source.batch(first)[0].shape[1:] for source in (images, conditions))
        if shape != given:
            raise DataError(
                f"the conditioning images in {names[1]} are {format_shape(given)}, but the images in {names[0]} are "
                f"{format_shape(shape)}: give both the same size and number of channels"
            )
        self.classes, self.class_names = images.classes, images.class_names
        self.earlier_labels = images.earlier_labels

    def __len__(self) -> int:
        return len(self._images)

    @property
    def in_memory(self) -> bool:
        return self._images.in_memory and self._conditions.in_memory

    @property
    def labels(self) -> Labels | None:
        return self._images.labels

    def content(self) -> str:
        both = [source.content() for source in (self._images, self._conditions)]
        if not all(both):
            return ""
        kinds = "+".join(each.partition(":")[0] for each in both)
        return f"{kinds}:{hashlib.sha256(' '.join(both).encode()).hexdigest()}"

    def batch(self, ids: Ids) -> tuple[Array, Labels | None]:
        images, labels = self._images.batch(ids)
        conditions, _ = self._conditions.batch(ids)
        if images.dtype != conditions.dtype:
            images, conditions = scaled(images, ids), scaled(conditions, ids)
        return np.concatenate([images, conditions], axis=1), labels
