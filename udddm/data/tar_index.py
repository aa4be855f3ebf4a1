"""The index of a tar shard: where its images are, their sizes and labels, for random access.

It is built once, in one pass over the shard, and kept as JSON next to a local shard (`<shard>.index.json`; that of
conditioning images: `<shard>.condition.index.json`), or, where that is not writable and for a shard at a URL, in the
cache directory. It is built again if size or modification time
(at a URL: ETag) of the shard differ from those recorded, or if other members are selected.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from udddm.data import access
from udddm.data.archive_names import MEMBERS, check_mode, check_name
from udddm.data.download import cache_directory
from udddm.data.encoded import LARGEST_FILE, PREFIX, read_header
from udddm.data.images import Labels
from udddm.errors import DataError
from udddm.files import atomic_write

log = logging.getLogger(__name__)

VERSION = 1
IMAGES = ("png", "jpg", "jpeg", "webp")
"""Extensions of images within a sample."""
LARGEST_HEADER = 1 << 20
"""Bytes of one extended tar header (a long name or pax records), and of a label."""
LARGEST_INDEX = 1 << 30
"""Bytes of an index."""
_FIELDS = ("name", "offset", "size", "width", "height", "gray", "label")


@dataclass(frozen=True)
class Selection:
    """Which members of a sample are its image and its label: extensions, or `json.KEY`. None: as in TarShards."""

    image: str | None = None
    label: str | None = None
    part: Literal["image", "condition"] = "image"
    """Whether the image of a sample is meant, or its conditioning image."""


@dataclass(frozen=True)
class ShardIndex:
    """The images of a shard of n samples, in the order of the archive."""

    names: list[str]
    offsets: npt.NDArray[np.int64]
    """[n], bytes from the start of the shard."""
    sizes: npt.NDArray[np.int64]
    """[n], bytes."""
    widths: npt.NDArray[np.int64]
    """[n], pixels. 0 if the header cannot be read."""
    heights: npt.NDArray[np.int64]
    """[n], pixels."""
    gray: npt.NDArray[np.bool_]
    """[n]."""
    labels: Labels | None
    """[n], or None without labels."""

    def __len__(self) -> int:
        return len(self.names)


class _Bounded(io.RawIOBase):
    """A file that refuses to read much at once: only the headers of a tar archive are read through it."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise DataError(f"{self._name} has a header of {size} bytes, more than {LARGEST_HEADER}: it is not read")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_or_build(shard: str, selection: Selection) -> ShardIndex:
    """The index of a shard at a path or URL. Raises DataError."""
    stamp = access.stamp(shard)
    identity = [VERSION, shard.rpartition("/")[2], stamp.size, stamp.tag, selection.image, selection.label]
    part = "" if selection.part == "image" else f".{selection.part}"
    beside = None if access.is_url(shard) else Path(f"{shard}{part}.index.json")
    digest = hashlib.sha256((shard if access.is_url(shard) else str(Path(shard).resolve())).encode()).hexdigest()
    cached = cache_directory() / "webdataset" / f"{digest}{part}.json"
    for place in (beside, cached):
        if place is not None and (found := _stored(place, identity, stamp.size)) is not None:
            return found
    log.info("data: building the index of %s, once", shard)
    try:
        rows, labelled = _build(shard, selection)
    except DataError:
        raise
    except Exception as error:  # tarfile.TarError, OSError, EOFError, and those of remote file systems
        raise access.failed(shard, "an uncompressed tar archive", error) from error
    kept = {"identity": identity, "labelled": labelled, "fields": _FIELDS, "samples": rows}
    content = json.dumps(kept).encode()
    for place in (beside, cached):
        if place is not None:
            with suppress(OSError):  # a directory of a shared data set is often read-only
                place.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(place, lambda file: file.write(content), shared=True)
                break
    else:
        log.warning("data: the index of %s cannot be kept: set XDG_CACHE_HOME to a writable directory", shard)
    return _parsed(rows, labelled)


def _stored(place: Path, identity: list[Any], size: int) -> ShardIndex | None:
    """A kept index; None if there is none, if it is stale, or if it is damaged."""
    try:
        if not 0 < place.stat().st_size <= LARGEST_INDEX:
            return None
        found = json.loads(place.read_bytes())
        if found["identity"] != identity or tuple(found["fields"]) != _FIELDS:
            return None
        index = _parsed(found["samples"], bool(found["labelled"]))
    except (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        return None
    inside = (index.offsets >= 0) & (index.sizes >= 0) & (index.sizes <= LARGEST_FILE)
    return index if bool((inside & (index.offsets <= size - index.sizes)).all()) else None


def _parsed(rows: list[list[Any]], labelled: bool) -> ShardIndex:
    columns: list[Any] = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in _FIELDS]
    names, offsets, sizes, widths, heights, gray, labels = columns
    numbers = [np.array(column, dtype=np.int64) for column in (offsets, sizes, widths, heights)]
    return ShardIndex(
        [str(name) for name in names],
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        np.array(gray, dtype=np.bool_),
        np.array(labels, dtype=np.int64) if labelled else None,
    )


def _build(shard: str, selection: Selection) -> tuple[list[list[Any]], bool]:
    """One row per sample, as _FIELDS, and whether the samples have labels."""
    rows: list[list[Any]] = []
    label = selection.label
    with access.open_sequential(shard) as file:
        for key, members in _samples(shard, file):
            sample = f"the sample {key} in {shard}"
            image = _image(members, selection, sample)
            if label is None and "cls" in members:
                if rows:
                    raise DataError(f"{sample} has a label (cls), but the first one has none: label all or none")
                label = "cls"
            offset, size = members[image]
            name = f"{key}.{image}"
            file.seek(offset)
            width, height, gray = _header(file.read(min(size, PREFIX)), size, name)
            if width == 0 and size > PREFIX:
                file.seek(offset)
                width, height, gray = _header(file.read(size), size, name)
            value = 0 if label is None else _label(file, members, label, sample)
            rows.append([name, offset, size, width, height, gray, value])
    return rows, label is not None


def _samples(shard: str, file: IO[bytes]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The key of each sample, and offset and size of its members by extension. Raises DataError."""
    size = access.stamp(shard).size
    seen = set()
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    for member in _files(shard, file):
        directory, _, base = member.name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:  # WebDataset ignores names without an extension; hidden files have no stem
            continue
        own = f"{directory}/{stem}" if directory else stem
        extension = extension.lower()
        if own != key:
            if key is not None:
                yield key, members
            if own in seen:
                raise DataError(f"{shard} has two samples named {own!r}: it is ambiguous which is meant")
            seen.add(own)
            key, members = own, {}
        if extension in members:
            raise DataError(f"{shard} has two members named {member.name!r}: it is ambiguous which is meant")
        if member.offset_data + member.size > size or member.size > LARGEST_FILE:
            raise DataError(f"{member.name} in {shard} announces {member.size} bytes, more than there are or may be")
        members[extension] = member.offset_data, member.size
    if key is not None:
        yield key, members


def _files(shard: str, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar archive. Raises DataError for links, devices and names that lead out of it."""
    with tarfile.open(fileobj=_Bounded(file, shard), mode="r:", errorlevel=2) as archive:
        count = 0
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else it keeps all of them
            count += 1
            if count > MEMBERS:
                raise DataError(f"{shard} has more than {MEMBERS} members")
            check_name(member.name.removeprefix("./").removesuffix("/") or ".", shard)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise DataError(
                    f"{shard} has the member {member.name!r}, which is a link or device: only files are read"
                )
            check_mode(member.mode, member.name, shard)
            yield member
        file.seek(archive.offset)
        if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
            raise DataError(f"{shard} is damaged at byte {archive.offset}: its remaining samples cannot be read")


def _image(members: dict[str, tuple[int, int]], selection: Selection, name: str) -> str:
    """The extension of the image of a sample, or of its conditioning image."""
    wanted, key, what, before = selection.image, "data.image", "image", ""
    if selection.part == "condition":
        key, what, before = "data.condition.image", "conditioning image", "condition."
    usual = [f"{before}{extension}" for extension in IMAGES]
    found = [wanted] if wanted is not None else [each for each in members if each in usual]
    if len(found) == 1 and found[0] in members:
        return found[0]
    there = ", ".join(members)
    if wanted is not None or not found:
        missing = wanted or f"{what} ({', '.join(usual)})"
        raise DataError(f"{name} has no {missing}; it has: {there}. Set {key}")
    raise DataError(f"{name} has several {what}s ({there}): set {key} to the extension of one")


def _header(start: bytes, size: int, name: str) -> tuple[int, int, bool]:
    """Width, height and grayness of an image, from its first bytes. Zeros if they do not suffice."""
    try:
        found = read_header(io.BytesIO(start), name, complete=len(start) == size)
    except DataError:
        return 0, 0, False
    return found.width, found.height, found.gray


def _label(file: IO[bytes], members: dict[str, tuple[int, int]], wanted: str, name: str) -> int:
    extension, _, key = wanted.partition(".") if wanted.startswith("json.") else (wanted, "", "")
    if extension not in members:
        raise DataError(f"{name} has no {extension}, its label; it has: {', '.join(members)}. Set data.label")
    offset, size = members[extension]
    if size > LARGEST_HEADER:
        raise DataError(f"the label of {name} has {size} bytes: set data.label to another member")
    file.seek(offset)
    try:
        value = json.loads(file.read(size))
        if key:
            value = value[key]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(f"the {wanted} of {name} cannot be read ({error}): labels are integers >= 0") from error
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise DataError(f"the {wanted} of {name} is {str(value)[:80]!r}: labels are integers >= 0")
    return value
