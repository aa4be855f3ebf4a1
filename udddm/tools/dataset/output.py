"""Data sets that are written in parts: a killed command resumes, and ends with the bytes of an undisturbed one.

Everything is written in `<target>.partial`, which is renamed when it is complete:

    plan.json          what is being written, from which data: another command is refused
    lock               held while a command writes
    parts/00000.json   this part of PART samples is complete
    data               the data set; in parts/*.zip until the end for a ZIP archive
    finished           only the renaming and the removal of this directory are left
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from udddm.data.images import Labels
from udddm.errors import ConfigError
from udddm.files import atomic_write, load_json, lock_file, make_directory, sync_directory, write_json

PART = 1024
"""Samples per part, and per shard of a Zarr array."""
FORMATS = ("zip", "folder", "zarr")
_OLDEST = (1980, 1, 1, 0, 0, 0)


class Work:
    """The directory in which a data set is being written."""

    def __init__(self, target: Path, plan: dict[str, Any]) -> None:
        """Raises ConfigError if the target exists, or if another command is writing it or has begun to."""
        self.target = target
        self.place = target.with_name(f"{target.name}.partial")
        self.data = self.place / "data"
        self._plan = plan

    def ended(self) -> bool:
        """Whether an earlier command completed the target and was stopped while it cleaned up, which is done now."""
        finished = self.place / "finished"
        if not self.target.exists() or not self.place.is_dir():
            return False
        if any(self.place.iterdir()):  # an empty directory is all that its last step leaves
            if not finished.exists():
                return False
            self._compare(load_json(finished))
        self._clean()
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Start or resume. Raises ConfigError."""
        if self.target.exists():
            raise ConfigError(f"{self.target} exists: remove it, or give another path")
        make_directory(self.place / "parts")
        descriptor = os.open(self.place / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                lock_file(descriptor)
            except BlockingIOError:
                raise ConfigError(f"another command is writing {self.target}") from None
            self._check_plan()
            yield
        finally:
            os.close(descriptor)

    def _check_plan(self) -> None:
        file = self.place / "plan.json"
        if not file.exists():
            write_json(file, self._plan)
            return
        self._compare(load_json(file))

    def _compare(self, found: object) -> None:
        known = found if isinstance(found, dict) else {}
        differing = [key for key in sorted({*known, *self._plan}) if known.get(key) != self._plan.get(key)]
        if differing:
            raise ConfigError(
                f"{self.place} was begun with other settings or data ({', '.join(differing)} differ): repeat that "
                "command to finish it, or remove the directory to start over"
            )

    def marker(self, part: int) -> Path:
        return self.place / "parts" / f"{part:05d}.json"

    def remember(self, part: int, facts: dict[str, Any]) -> None:
        """Record that a part is complete, with what is known of it."""
        os.sync()  # its files, of which there may be a thousand
        write_json(self.marker(part), facts)

    def remembered(self, part: int) -> dict[str, Any] | None:
        """What was recorded of a part, or None if it is not complete."""
        marker = self.marker(part)
        found: dict[str, Any] | None = load_json(marker, "samples") if marker.exists() else None
        return found

    def finish(self, sink: Sink, labels: Labels | None, class_names: Sequence[str]) -> None:
        """Complete the data set, rename it to its final name, and remove the directory."""
        finished = self.place / "finished"
        if not finished.exists():
            sink.finish(labels, class_names)
            os.sync()
            write_json(finished, self._plan)
        if self.data.exists():
            self.data.rename(self.target)
            sync_directory(self.target.parent)
        self._clean()

    def _clean(self) -> None:
        finished = self.place / "finished"
        for entry in self.place.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != finished:
                entry.unlink()
        finished.unlink(missing_ok=True)  # after everything that takes long
        self.place.rmdir()


def write_parts(
    work: Work, sink: Sink, count: int, make: Callable[[npt.NDArray[np.int64]], tuple[npt.NDArray[Any], dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Write the parts of `count` samples that are not complete. Returns what is remembered of each.

    `make(ids)` returns the samples of a part, and facts to remember.
    """
    from tqdm import tqdm

    remembered = []
    with tqdm(total=count, desc=work.target.name, unit="image", disable=None) as bar:
        for part, first in enumerate(range(0, count, PART)):
            ids = np.arange(first, min(first + PART, count))
            if (facts := work.remembered(part)) is None:
                rows, found = make(ids)
                facts = {"samples": len(ids), **found}
                sink.write(part, rows)
                work.remember(part, facts)
            remembered.append(facts)
            bar.update(len(ids))
    return remembered


def edm_name(index: int) -> str:
    """The name of an image in EDM's format: directories of a thousand files."""
    return f"{index:08d}"[:5] + f"/img{index:08d}.png"


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """An image [C, H, W], C = 1 or 3, as an uncompressed PNG, like those of EDM."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.save(file, format="PNG", compress_level=0)
    return file.getvalue()


def index_of(labels: Labels, class_names: Sequence[str]) -> bytes:
    """The file dataset.json in EDM's format, with the names of the classes if they are known."""
    found: dict[str, Any] = {"labels": [[edm_name(index), label] for index, label in enumerate(labels.tolist())]}
    if class_names:
        found["class_names"] = list(class_names)
    return json.dumps(found).encode()


class Sink(ABC):
    """Writes the parts of a data set in one format. Parts may be written in any order, and again."""

    def __init__(self, work: Work) -> None:
        self.work = work

    @abstractmethod
    def write(self, part: int, images: npt.NDArray[Any]) -> None:
        """Write the samples PART * part, ...: [n, C, H, W]."""

    @abstractmethod
    def finish(self, labels: Labels | None, class_names: Sequence[str]) -> None:
        """Complete the data set in `work.data`."""


class FolderSink(Sink):
    """PNG files and dataset.json."""

    def write(self, part: int, images: npt.NDArray[Any]) -> None:
        for index, pixels in enumerate(images, start=PART * part):
            file = self.work.data / edm_name(index)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(pixels))

    def finish(self, labels: Labels | None, class_names: Sequence[str]) -> None:
        if labels is not None:
            (self.work.data / "dataset.json").write_bytes(index_of(labels, class_names))


class ZipSink(Sink):
    """A ZIP archive of PNG files and dataset.json, without compression. It takes its size twice until the end."""

    def _part(self, part: int) -> Path:
        return self.work.place / "parts" / f"{part:05d}.zip"

    def write(self, part: int, images: npt.NDArray[Any]) -> None:
        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for index, pixels in enumerate(images, start=PART * part):
                    archive.writestr(zipfile.ZipInfo(edm_name(index), _OLDEST), png(pixels))

        atomic_write(self._part(part), write)

    def finish(self, labels: Labels | None, class_names: Sequence[str]) -> None:
        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for part in sorted((self.work.place / "parts").glob("*.zip")):
                    with zipfile.ZipFile(part) as one:
                        for info in one.infolist():
                            archive.writestr(zipfile.ZipInfo(info.filename, _OLDEST), one.read(info))
                if labels is not None:
                    archive.writestr(zipfile.ZipInfo("dataset.json", _OLDEST), index_of(labels, class_names))

        atomic_write(self.work.data, write)


class ZarrSink(Sink):
    """A Zarr group with the arrays `images` [N, C, H, W], one sample per chunk and PART chunks per shard, and `labels`.

    `attributes` are those of the group, in addition to `class_names`.
    """

    def __init__(
        self, work: Work, count: int, shape: tuple[int, ...], dtype: str, attributes: dict[str, Any] | None = None
    ) -> None:
        super().__init__(work)
        self._count, self._shape, self._dtype = count, shape, dtype
        self._attributes = attributes or {}
        self._images: Any = None

    def write(self, part: int, images: npt.NDArray[Any]) -> None:
        first = PART * part
        self._array()[first : first + len(images)] = images

    def finish(self, labels: Labels | None, class_names: Sequence[str]) -> None:
        import zarr

        group = zarr.open_group(self.work.data, mode="a")
        group.attrs.update({**self._attributes, **({"class_names": list(class_names)} if class_names else {})})
        if labels is not None:
            group.create_array("labels", data=labels, overwrite=True, config={"write_empty_chunks": True})
        for left in self.work.data.rglob("*.partial"):  # temporary files of Zarr, from a command that was killed
            left.unlink()

    def _array(self) -> Any:
        import zarr

        if self._images is None:
            if not any((self.work.place / "parts").iterdir()):  # a killed start may have left an incomplete one
                shutil.rmtree(self.work.data, ignore_errors=True)
                zarr.create_group(self.work.data).create_array(
                    "images",
                    shape=(self._count, *self._shape),
                    dtype=self._dtype,
                    chunks=(1, *self._shape),
                    shards=(PART, *self._shape),
                )
            with zarr.config.set({"array.write_empty_chunks": True}):  # a missing chunk counts as lost
                self._images = zarr.open_group(self.work.data, mode="r+")["images"]
        return self._images


def format_of(target: Path) -> str:
    """The format that the name of a target says: zip, zarr, or a folder."""
    return {".zip": "zip", ".zarr": "zarr"}.get(target.suffix.lower(), "folder")


def open_sink(work: Work, kind: str, count: int, shape: tuple[int, ...]) -> Sink:
    """The writer of uint8 images [C, H, W] in a format."""
    if kind == "zarr":
        return ZarrSink(work, count, shape, "uint8")
    return ZipSink(work) if kind == "zip" else FolderSink(work)
