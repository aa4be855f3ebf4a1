"""A data set of WebDataset shards: tar archives whose members of one sample share a name, such as 000042.jpg and .cls.

The shards are read in random order, through an index of the samples in each (`udddm/data/tar_index.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from udddm.data import access
from udddm.data.encoded import PREFIX, Header, ImageFiles, require_pillow
from udddm.data.folder_labels import FolderLabels
from udddm.data.tar_index import Selection, read_or_build
from udddm.errors import DataError
from udddm.files import expanded

MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarShards(ImageFiles):
    """The images in tar shards, in the order of the shards and of their members.

    `where` is a shard, a directory of shards (sorted by name), or a pattern such as `train-{000..127}.tar`, at a path
    or URL. `image` is the extension of the images within a sample; by default they are the only member of a sample that
    ends in png, jpg, jpeg or webp. `label` is the extension of a file that contains the label, or `json.KEY`; by
    default cls, if the first sample has it. `part` selects the images of the samples, or their conditioning images, of
    which `image` is then the extension; by default the only member that ends in condition.png, condition.jpg and the
    like.

    Raises DataError for missing or damaged shards, samples without image or label, or members that are refused.
    """

    def __init__(
        self,
        where: str,
        image: str | None = None,
        label: str | None = None,
        *,
        part: Literal["image", "condition"] = "image",
    ) -> None:
        require_pillow(where)
        self.where = where
        self.shards = shards_of(where)
        self.remote = access.is_url(self.shards[0])
        self._indices = [read_or_build(shard, Selection(image, label, part)) for shard in self.shards]
        self._starts = np.cumsum([0, *(len(index) for index in self._indices)])
        if not self._starts[-1]:
            raise DataError(f"{where} contains no samples")
        self.found = self._labels()
        self._reader = access.RangeReader()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self._indices[shard].names[row]} in {self.shards[shard]}"

    def read(self, index: int) -> bytes:
        return self._read(index, None)

    def prefix(self, index: int) -> bytes:
        return self._read(index, PREFIX)

    def headers(self) -> Iterator[Header]:
        """From the index; only files whose headers could not be read then are read again, which raises the error."""
        at = 0
        for found in self._indices:
            columns = (found.widths.tolist(), found.heights.tolist(), found.gray.tolist())
            for width, height, gray in zip(*columns, strict=True):
                yield Header(width, height, gray) if width else self.header(at)
                at += 1

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _read(self, index: int, most: int | None) -> bytes:
        shard, row = self._place(index)
        found = self._indices[shard]
        size = int(found.sizes[row])
        return self._reader.read(self.shards[shard], int(found.offsets[row]), size if most is None else min(size, most))

    def _labels(self) -> FolderLabels:
        found = [index.labels for index in self._indices if len(index)]
        labelled = [labels for labels in found if labels is not None]
        if not labelled:
            return FolderLabels()
        if len(labelled) < len(found):
            raise DataError(f"{self.where}: only some shards have labels (cls): label all samples or none")
        labels = np.concatenate(labelled)
        return FolderLabels(labels, [], int(labels.max()) + 1)


def shards_of(where: str) -> list[str]:
    """The paths or URLs of the shards at `where`. Raises DataError."""
    if _BRACES.search(where):
        found = list(_expanded_braces(where))
    elif access.is_url(where):
        if where.endswith(".tar") or not access.is_directory(where):
            found = [where]
        else:
            root = where.rstrip("/")
            found = [f"{root}/{name}" for name in sorted(access.find(root)) if name.endswith(".tar")]
    else:
        path = expanded(where)
        found = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else [str(path)]
    if not found:
        raise DataError(f"{where} contains no shards: none of its files ends in .tar")
    if not access.is_url(found[0]):
        found = [str(expanded(shard)) for shard in found]
        missing = [shard for shard in found if not Path(shard).is_file()]
        if missing:
            more = f" and {len(missing) - 1} others" if missing[1:] else ""
            raise DataError(f"the shard {missing[0]}{more} does not exist: data.path must be the tar files")
    return found


def _expanded_braces(where: str) -> Iterator[str]:
    match = _BRACES.search(where)
    if match is None:
        yield where
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MOST_SHARDS:
        raise DataError(f"{where}: the numbers in {match[0]} must rise, and name at most {MOST_SHARDS} shards")
    width = len(match[1]) if match[1].startswith("0") else 0
    for number in range(first, last + 1):
        yield from _expanded_braces(f"{where[: match.start()]}{number:0{width}d}{where[match.end() :]}")
