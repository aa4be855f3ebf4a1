"""A data set of Hugging Face `datasets`: a folder written by save_to_disk, Parquet files, or an object in memory."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from udddm.data import access
from udddm.data.encoded import LARGEST_FILE, EncodedImages, Header, ImageFiles, read_header, require_pillow
from udddm.data.folder_labels import FolderLabels
from udddm.data.images import check_labels
from udddm.errors import DataError
from udddm.files import expanded

CONDITIONS = ("condition", "conditioning_image")
"""Names of the column of conditioning images, in the order of the search."""
LABELS = ("label", "labels", "fine_label", "class", "y", "target")
"""Names of the column of labels, in the order of the search."""
ROWS = 1024
"""Rows whose headers are read at a time."""


def open_huggingface(
    where: str, *, image: str | None = None, label: str | None = None, split: str | None = None
) -> HuggingFaceRows:
    """The images of a local folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, of a Parquet file,
    or of a folder of Parquet files (sorted by name).

    `image` and `label` are names of columns; see HuggingFaceRows. `split` is that of a DatasetDict, which has no other
    default than its only split, or "train".

    Raises DataError if the folder is none of these, and as HuggingFaceRows does.
    """
    return HuggingFaceRows(_table(where, split), str(expanded(where)), image=image, label=label)


def _table(where: str, split: str | None) -> Any:
    """The `datasets.Dataset` at a path. Raises DataError."""
    if access.is_url(where):
        raise DataError(f"{where}: data sets of Hugging Face are memory-mapped: copy it to a local disk")
    path = expanded(where)
    datasets = _package(where)
    try:
        return _on_disk(datasets, path, split) if path.is_dir() and is_saved(path) else _parquet(datasets, path, split)
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many types
        raise DataError(f"cannot read {where} with Hugging Face datasets: {error}") from error


def open_conditions(where: str, *, condition: str | None = None, split: str | None = None) -> HuggingFaceRows:
    """The conditioning images in the column `condition` of the table at `where`; by default the first of CONDITIONS.

    Raises DataError as `open_huggingface` does.
    """
    found = _table(where, split)
    usual = [name for name in CONDITIONS if name in found.features]
    if condition is None and not usual:
        raise DataError(
            f"{where} has no column {' or '.join(CONDITIONS)}; the columns are {', '.join(found.features)}. Set "
            "data.condition.image to that of the conditioning images"
        )
    column = condition or usual[0]
    if column not in found.features:
        raise DataError(
            f"{where}: there is no column data.condition.image={column}; the columns are {', '.join(found.features)}"
        )
    return HuggingFaceRows(found.select_columns([column]), str(expanded(where)), image=column)


def is_saved(path: Path) -> bool:
    """Whether a directory was written by save_to_disk."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def wrapped(source: object) -> object:
    """A `datasets.Dataset` as a source of images; any other object unchanged. Raises DataError."""
    datasets = sys.modules.get("datasets")  # an object of it can only exist once it has been imported
    if datasets is None:
        return source
    kinds = [getattr(datasets, name, ()) for name in ("Dataset", "DatasetDict", "IterableDataset")]
    if isinstance(source, kinds[1]):
        raise DataError(f"the data set is a DatasetDict: give one of its splits ({', '.join(source)})")
    if isinstance(source, kinds[2]):
        raise DataError("the data set is an IterableDataset, which has no random access: load it without streaming")
    if not isinstance(source, kinds[0]):
        return source
    return EncodedImages(HuggingFaceRows(source, "the Hugging Face data set", trusted=True))


class HuggingFaceRows(ImageFiles):
    """The rows of a `datasets.Dataset` with a column of images, in their order.

    Args:
        dataset: the data set. Its format and transforms are not used.
        where: its name in messages.
        image: the column of images, of type Image or binary. Default: the only such column, or that named image.
        label: the column of labels, of type ClassLabel or integer. Default: the first of LABELS that exists, or else
            the only column of type ClassLabel. The names of a ClassLabel are the names of the classes.
        trusted: whether rows may refer to local files, as those of an object that a program has built do. URLs are
            never opened.

    Raises DataError for missing or ambiguous columns, and labels that are not integers >= 0.
    """

    def __init__(
        self, dataset: Any, where: str, *, image: str | None = None, label: str | None = None, trusted: bool = False
    ) -> None:
        require_pillow(where)
        datasets = _package(where)
        self.where = where
        self._trusted = trusted
        if not len(dataset):
            raise DataError(f"{where} has no rows")
        self._image = _image_column(dataset.features, image, where)
        label = _label_column(dataset.features, label, where)
        self.found = FolderLabels() if label is None else _labels(dataset, label, where)
        rows = dataset.with_format(None).select_columns([self._image])
        # Files stay encoded: they are decoded like those of a folder, and only in the formats that folders have.
        self._rows = rows.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.where}"

    def read(self, index: int) -> bytes:
        return self._bytes(self._rows[index][self._image], index)

    def headers(self) -> Iterator[Header]:
        for first in range(0, len(self), ROWS):
            for row, value in enumerate(self._rows[first : first + ROWS][self._image], start=first):
                yield read_header(io.BytesIO(self._bytes(value, row)), self.name(row))

    def _bytes(self, value: Any, row: int) -> bytes:
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
        if data is not None:
            return bytes(data)
        if path is None:
            raise DataError(f"{self.name(row)} has no image: remove the row")
        if not self._trusted or access.is_url(str(path)):
            raise DataError(
                f"{self.name(row)} refers to {str(path)[:200]} instead of containing its image: write the data set "
                "with its images (save_to_disk and to_parquet of the current version embed local files)"
            )
        return access.read_all(str(path), LARGEST_FILE)


def _package(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {where} needs Hugging Face datasets: pip install 'udddm[hf]'") from error
    return datasets


def _on_disk(datasets: Any, path: Path, split: str | None) -> Any:
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        path = path / _split_of(names, split, str(path))
    elif split is not None:
        raise DataError(f"data.split={split}: {path} is one data set without splits; remove data.split")
    for file in json.loads((path / "state.json").read_text())["_data_files"]:
        name = file["filename"]
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{path / 'state.json'} names the file {str(name)[:200]!r} outside of its folder")
    return datasets.Dataset.load_from_disk(str(path))


def _split_of(names: Sequence[Any], split: str | None, where: str) -> str:
    known = [name for name in names if isinstance(name, str) and Path(name).name == name]
    chosen = split or (known[0] if len(known) == 1 else "train")
    if chosen not in known:
        raise DataError(f"{where} has the splits {', '.join(known)}: set data.split to one of them")
    return chosen


def _parquet(datasets: Any, path: Path, split: str | None) -> Any:
    if split is not None:
        raise DataError(f"data.split={split}: Parquet files have no splits; set data.path to the files of the split")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"{path} is neither a folder written by save_to_disk nor a Parquet file or a folder of Parquet files"
        )
    # Converted once to Arrow, in the cache of datasets, because a Parquet file has no random access.
    return datasets.Dataset.from_parquet([str(file) for file in files])


def _image_column(features: Any, wanted: str | None, where: str) -> str:
    """The name of the column of images. Raises DataError."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    binary = [name for name, feature in features.items() if getattr(feature, "dtype", "") in ("binary", "large_binary")]
    images: list[str] = [name for name, kind in kinds.items() if kind == "Image"] or binary
    if wanted is None and len(images) > 1 and "image" in images:
        return "image"
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted is not None and (kinds.get(wanted) == "Image" or wanted in binary):
        return wanted
    columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    what = f"the column data.image={wanted} is not one of images" if wanted else "data.image must name the images"
    raise DataError(f"{where}: {what}; the columns are {columns}")


def _label_column(features: Any, wanted: str | None, where: str) -> str | None:
    """The name of the column of labels, or None. Raises DataError."""
    if wanted is not None:
        if wanted not in features:
            raise DataError(f"{where}: there is no column data.label={wanted}; the columns are {', '.join(features)}")
        return wanted
    kinds = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    usual = [name for name in LABELS if name in features] or kinds
    return str(usual[0]) if usual and (usual[0] in LABELS or len(usual) == 1) else None


def _labels(dataset: Any, column: str, where: str) -> FolderLabels:
    feature = dataset.features[column]
    names = [str(name) for name in getattr(feature, "names", None) or []]
    values = np.array(dataset.with_format(None)[column][:])
    labels = check_labels(values, len(dataset), len(names) or None, f"{where}, column {column}")
    return FolderLabels(labels, names, len(names) or int(labels.max()) + 1)
