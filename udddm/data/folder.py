"""A data set of the image files in a folder, on a local disk or at a URL."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from udddm.data import access, folder_labels
from udddm.data.encoded import (
    LARGEST_FILE,
    PREFIX,
    SUFFIXES,
    EncodedImages,
    Header,
    ImageFiles,
    read_header,
    require_pillow,
    unreadable,
)
from udddm.errors import DataError
from udddm.files import expanded

log = logging.getLogger(__name__)

OTHER_IMAGES = re.compile(
    r"\.(avif|dng|exr|gif|gz|hdr|hei[cf]|jfif|jp2|jpe|jxl|np[yz]|p[bgnp]m|psd|svg|tar|tga|tiff?|zip)", re.IGNORECASE
)
"""Files that may be images but are not read here. A warning reports their number."""


class FolderImages(EncodedImages):
    """All PNG, JPEG, WebP and BMP files below `root`, sorted by relative path, as uint8 [C, H, W].

    Hidden files are skipped, and a warning counts files of other image formats. Pixels are decoded at each access, so a
    large data set is faster as an array (`name: array`).

    Labels are read from `dataset.json` in `root`, in the format of dataset_tool.py of EDM and StyleGAN:
    `{"labels": [["00000/img00000000.png", 7], ...]}`. Without that file, if every image is in a direct subdirectory of
    `root`, the sorted names of the subdirectories are the classes, except numbered directories of a thousand files each
    (00000, 01000, ...).

    Raises DataError as EncodedImages does, and for a folder that is missing or has no images, a directory that cannot
    be listed, or a class without images. Each error names the file.
    """

    def __init__(self, root: Path, size: int | None = None) -> None:
        files = LocalFolder(root, rotated=size is None)
        self.files = files.files
        super().__init__(files, size)


class LocalFolder(ImageFiles):
    """The image files below a local directory. Without `rotated`, headers have the stored width and height.

    Raises DataError.
    """

    def __init__(self, root: Path, *, rotated: bool = True) -> None:
        if root.is_file():
            raise DataError(
                f"{root} is a file, not a folder: unpack it, and set data.path to the folder with the images"
            )
        if not root.is_dir():
            raise DataError(f"{root} is not a local directory: data.path must be the folder with the images")
        require_pillow(str(root))
        self.files, others = _find(root)
        report_others(str(root), self.files, others)
        self.where = str(root)
        self._root, self._rotated = root, rotated
        index = root / folder_labels.INDEX
        self.found = folder_labels.find(
            self.where,
            self.files,
            others,
            index.read_bytes if index.is_file() else None,
            [place.name for place in root.iterdir() if place.is_dir()],
        )
        if self.found.differs:
            self.earlier_labels = folder_labels.of_directories(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self._root / self.files[index])

    def relative(self, index: int) -> str:
        return self.files[index].as_posix()

    def read(self, index: int) -> bytes:
        try:
            return (self._root / self.files[index]).read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{self.name(index)} no longer exists: restore it, or start a new run") from error
        except OSError as error:
            raise unreadable(self.name(index), error) from error

    def header(self, index: int) -> Header:
        try:
            with (self._root / self.files[index]).open("rb") as opened:
                return read_header(opened, self.name(index), rotated=self._rotated)
        except OSError as error:
            raise unreadable(self.name(index), error) from error


class RemoteFolder(ImageFiles):
    """The image files below a URL, in the order of a local folder. Raises DataError."""

    remote = True

    def __init__(self, url: str) -> None:
        require_pillow(url)
        self.where = url.rstrip("/")
        self._files, others, directories = split_names(access.find(self.where))
        if not self._files and not others:
            raise DataError(f"nothing exists at {url}: data.path must be the folder with the images")
        report_others(url, self._files, others)
        index = f"{self.where}/{folder_labels.INDEX}"
        read = partial(access.read_all, index, folder_labels.LARGEST_INDEX)
        there = Path(folder_labels.INDEX) in others
        self.found = folder_labels.find(self.where, self._files, others, read if there else None, directories)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return f"{self.where}/{self.relative(index)}"

    def relative(self, index: int) -> str:
        return self._files[index].as_posix()

    def read(self, index: int) -> bytes:
        data = access.read_start(self.name(index), LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise DataError(f"{self.name(index)} has more than {LARGEST_FILE} bytes: it is not read")
        return data

    def prefix(self, index: int) -> bytes:
        return access.read_start(self.name(index), PREFIX)


def split_names(names: Iterable[str]) -> tuple[list[Path], list[Path], list[str]]:
    """Sorts relative names into image files, other files, and names of direct subdirectories.

    Hidden files and files in hidden directories are left out.
    """
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    images = sorted(name for name in shown if name.lower().endswith(SUFFIXES))
    others = [Path(name) for name in shown if name and not name.lower().endswith((*SUFFIXES, "/"))]
    return [Path(name) for name in images], others, sorted({name.split("/")[0] for name in shown if "/" in name})


def report_others(where: str, files: Sequence[Path], others: Sequence[Path]) -> None:
    """Raise DataError if there are no images, and warn of files that may be images and are not read."""
    counted = Counter(file.suffix.lower() for file in others if OTHER_IMAGES.fullmatch(file.suffix))
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counted.items()))
    if not files:
        there = f" (there are: {kinds})" if kinds else ""
        raise DataError(f"{where} contains no images: none of its files ends in {', '.join(SUFFIXES)}{there}")
    if kinds:
        log.warning(
            "data: %s: %d files are ignored: %s; only %s are read. Convert them to PNG to train on them",
            where, counted.total(), kinds, ", ".join(SUFFIXES),
        )  # fmt: skip


def open_folder(where: str, size: int | None = None) -> ImageFiles:
    """The image files of a folder at a path or URL; `size` as in EncodedImages. Raises DataError."""
    return RemoteFolder(where) if access.is_url(where) else LocalFolder(expanded(where), rotated=size is None)


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
