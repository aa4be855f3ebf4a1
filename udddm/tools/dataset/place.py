"""The section `data` of a configuration for what a path or URL holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from udddm.config import DataConfig
from udddm.data import access
from udddm.data.encoded import SUFFIXES, ImageFiles
from udddm.data.huggingface import is_saved
from udddm.data.loading import BUILT_IN, CONDITIONS_APART, CONDITIONS_WITHIN, FILES
from udddm.errors import ConfigError, DataError
from udddm.storage import local_path

NAMED = tuple(name for name in BUILT_IN if name not in FILES and name != "array")
"""Data sets that need no path."""
MEASURED = 2048
"""Images of which the standard deviation is measured."""
_HEADERS = 512
_BY_SUFFIX = {
    ".npy": "array",
    ".npz": "array",
    ".zarr": "array",
    ".zip": "zip",
    ".tar": "webdataset",
    ".parquet": "huggingface",
}


def section_of(where: str) -> dict[str, Any]:
    """The section `data` for a path or URL of any kind of data set, or the name of a built-in one.

    Raises ConfigError for what is none of them, and DataError for a URL that cannot be read.
    """
    local = local_path(where)
    if local is None:
        return {"name": _remote_kind(where), "path": where}
    if where in NAMED and not local.exists():
        return {"name": where}
    if (local / "run.json").exists():
        raise ConfigError(f"{where} is a run, not a data set: udddm train --config {where}/config.yaml resumes it")
    kind = _BY_SUFFIX.get(local.suffix.lower())
    if kind is not None and (local.exists() or "{" in where):
        return {"name": kind, "path": str(local.resolve())}
    if local.is_dir():
        return {"name": _directory_kind(local), "path": str(local.resolve())}
    if local.is_file():
        raise ConfigError(
            f"{where}: unpack it, and give the folder with the images; or give a .zip, .tar, .parquet, .npy, .npz or "
            "Zarr file"
        )
    raise ConfigError(f"{where}: there is no such folder or file; the built-in data sets are {', '.join(NAMED)}")


def _directory_kind(path: Path) -> str:
    if (path / "zarr.json").exists() or (path / ".zgroup").exists() or (path / ".zarray").exists():
        return "array"
    if is_saved(path):
        return "huggingface"
    return _kind_of_names(entry.name for entry in path.iterdir())


def _remote_kind(url: str) -> str:
    """The kind of a URL. Without a known suffix, a folder if it contains images, and an array otherwise."""
    kind = _BY_SUFFIX.get(Path(url.rstrip("/")).suffix.lower())
    if kind is not None:
        return kind
    try:
        names = access.find(url.rstrip("/")) if access.is_directory(url) else []
    except DataError:
        return "array"
    if any(name in ("zarr.json", ".zgroup", ".zarray") for name in names):
        return "array"
    if any(name.lower().endswith(SUFFIXES) for name in names):
        return "folder"
    return _kind_of_names(name for name in names if "/" not in name) if names else "array"


def _kind_of_names(names: Any) -> str:
    """The kind of a directory by the files directly in it: shards, Parquet files, or else images."""
    suffixes = {Path(name).suffix.lower() for name in names if not name.startswith(".")}
    if suffixes & set(SUFFIXES):
        return "folder"
    if ".tar" in suffixes:
        return "webdataset"
    return "huggingface" if ".parquet" in suffixes else "folder"


def common_size(files: ImageFiles, sides: tuple[int, ...], small: int) -> int | None:
    """The size to resize images to if theirs differ or are larger than `small` pixels.

    It is the largest of `sides` that most images have, judged by evenly spaced ones. None if they can stay as they are.
    """
    sizes = []
    for index in measured_ids(len(files), _HEADERS).tolist():
        try:
            header = files.header(index)
        except DataError:  # named when the data set is opened
            continue
        sizes.append((header.width, header.height))
    if not sizes or (len(set(sizes)) == 1 and max(sizes[0]) <= small):
        return None
    usual = float(np.median([min(size) for size in sizes]))
    return next((side for side in sides if side <= usual), min(sides))


def measured_ids(count: int, most: int = MEASURED) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Evenly spaced indices of at most `most` of `count` samples, int64."""
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def with_conditions(section: dict[str, Any], given: str) -> dict[str, Any]:
    """The section `data` of a data set of pairs. `given` is where its conditioning images are: a path or URL, or their
    member, column or array in the data set; "" for the usual name. Raises ConfigError."""
    local = local_path(given) if given else None
    place = bool(given) and (local is None or local.exists() or section["name"] not in CONDITIONS_WITHIN)
    apart = place and section["name"] in CONDITIONS_APART
    return {**section, "condition": {"kind": "pairs", "path" if apart else "image": given or None}}


def configuration(where: str, *, conditions: str | None = None, **settings: Any) -> DataConfig:
    """The section `data` for a path or URL, with settings (None: not given). `conditions` makes it a data set of pairs,
    as `with_conditions` does. Raises ConfigError."""
    given = {key: value for key, value in settings.items() if value is not None}
    section = {**section_of(where), **given}
    return DataConfig(**(section if conditions is None else with_conditions(section, conditions)))
