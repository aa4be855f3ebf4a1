"""The labels of a folder of images, from dataset.json or from the names of its subdirectories."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from udddm.data.images import Labels
from udddm.errors import DataError

log = logging.getLogger(__name__)

INDEX = "dataset.json"
LARGEST_INDEX = 256 << 20
"""Bytes of a dataset.json in an archive or at a URL."""
SHARD = 1000
"""Files per numbered directory in the layout of EDM, StyleGAN and FFHQ."""


@dataclass(frozen=True)
class FolderLabels:
    """The labels of a folder of images."""

    labels: Labels | None = None
    """One label per file, int64 [N]. None without labels."""
    class_names: list[str] = field(default_factory=list)
    classes: int | None = None
    differs: bool = False
    """Whether earlier versions used the directories as classes here."""


def find(
    where: str,
    files: Sequence[Path],
    others: Sequence[Path],
    index: Callable[[], bytes] | None,
    directories: Sequence[str],
) -> FolderLabels:
    """The labels of the images `files` at the place `where`.

    `others` are all other files, both relative to `where`; `index` reads its dataset.json, and is None if there is
    none; `directories` are the names of its direct subdirectories. Raises DataError.
    """
    nested = all(len(file.parts) == 2 for file in files)
    name = f"{where}/{INDEX}"
    entries, names = _read(name, index) if index is not None else (None, [])
    if entries is not None:
        labels = _lookup(name, entries, files) if entries else None
        if labels is not None or _are_shards(files):
            highest = 0 if labels is None else int(labels.max()) + 1
            known = names if len(names) >= highest > 0 else []
            return FolderLabels(labels, known, len(known) or highest or None, differs=nested)
    if not nested:
        return FolderLabels()
    if _are_shards(files):
        log.warning(
            "data: %s: its numbered directories are parts of a large data set, not classes: the images have no labels. "
            'Add a file dataset.json, {"labels": [["%s", 0], ...]}, or name the directories after their class',
            where, files[0].as_posix(),
        )  # fmt: skip
        return FolderLabels(differs=True)
    _check_classes(where, files, others, directories)
    names = sorted({file.parts[0] for file in files})
    return FolderLabels(of_directories(files), names, len(names))


def of_directories(files: Sequence[Path]) -> Labels:
    """The index of each file's directory in the sorted list of directories, int64 [N]."""
    numbers = {name: number for number, name in enumerate(sorted({file.parts[0] for file in files}))}
    return np.array([numbers[file.parts[0]] for file in files], dtype=np.int64)


def _read(name: str, index: Callable[[], bytes]) -> tuple[list[Any] | None, list[str]]:
    """The entries and the class names of a dataset.json.

    The entries are empty for `"labels": null`, and None if the file has no `labels`. Class names (`"class_names"`) are
    an addition of `udddm data resize` to EDM's format.
    """
    try:
        found = json.loads(index().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"cannot read {name} ({error}): repair it, or move it away if it does not belong to the data set"
        ) from error
    if not isinstance(found, dict) or "labels" not in found:
        log.warning("data: %s has no list named labels and is ignored", name)
        return None, []
    entries, names = found["labels"], found.get("class_names")
    if entries is None:
        return [], []
    if not isinstance(entries, list):
        raise DataError(f'{name}: "labels" must be a list of [file, label] pairs or null')
    valid: list[str] = names if isinstance(names, list) and all(isinstance(each, str) for each in names) else []
    return entries, valid


def _lookup(index: str, entries: list[Any], files: Sequence[Path]) -> Labels:
    labels = {}
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise DataError(f'{index}: {json.dumps(entry)[:80]} in "labels" is not a pair of a file and a label')
        name, label = entry
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise DataError(f"{index}: the label of {name} is {json.dumps(label)[:80]}: labels are integers >= 0")
        labels[name.replace("\\", "/").removeprefix("./")] = label
    missing = [file.as_posix() for file in files if file.as_posix() not in labels]
    if missing:
        raise DataError(
            f"{index} has no label for {missing[0]}" + (f" and {len(missing) - 1} other files" if missing[1:] else "") +
            ": add the labels, or move these files out of the data set"
        )  # fmt: skip
    if absent := len(labels) - len(files):
        log.warning("data: %s names %d files that do not exist: is the copy complete?", index, absent)
    return np.array([labels[file.as_posix()] for file in files], dtype=np.int64)


def _are_shards(files: Sequence[Path]) -> bool:
    """Whether the directories are 00000, 00001, ... (or 01000, ...), each with the files of one thousand."""
    for file in files:
        number = re.search(r"(\d+)$", file.stem)
        if len(file.parts) != 2 or not re.fullmatch(r"\d{5}", file.parts[0]) or number is None:
            return False
        part = int(number[1]) // SHARD
        if int(file.parts[0]) not in (part, part * SHARD):
            return False
    return True


def _check_classes(where: str, files: Sequence[Path], others: Sequence[Path], directories: Sequence[str]) -> None:
    """Raise DataError for a directory without images. Skipping it would shift the labels of all later classes."""
    with_images = {file.parts[0] for file in files}
    for place in sorted(directories):
        if place.startswith(".") or place in with_images:
            continue
        kinds = Counter(file.suffix.lower() or "no suffix" for file in others if file.parts[0] == place)
        what = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items())) or "no other file"
        raise DataError(
            f"the class directory {where}/{place} contains no readable images (it contains: {what}), which would "
            "change the labels of the classes after it: convert its files to PNG, or move the directory out of the "
            "data set"
        )
