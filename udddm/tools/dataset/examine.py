"""`udddm data inspect`: what a data set contains, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset, pictures
from udddm.data.encoded import ImageFiles, decode
from udddm.data.images import Labels, format_shape
from udddm.data.loading import FILES, open_conditions, open_files
from udddm.errors import DataError
from udddm.tools.dataset.place import measured_ids
from udddm.tools.dataset.source import in_parallel

LISTED = 20
"""Damaged files and duplicates that the text names."""


@dataclass(frozen=True)
class _Seen:
    """One image: its shape, mode and pixels as a digest, and sums of its values in [-1, 1]."""

    name: str
    error: str = ""
    shape: str = ""
    mode: str = ""
    digest: bytes = b""
    low: float = math.nan
    high: float = math.nan
    moments: tuple[int, float, float] = (0, 0.0, 0.0)
    """Number, sum and sum of squares of its values."""


@dataclass
class Contents:
    """What was found."""

    data: str
    """Path or name of the data set."""
    name: str
    """Its kind (data.name)."""
    images: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    """Number of images of each shape, CxHxW."""
    modes: Counter[str] = field(default_factory=Counter)
    """Number of images of each PIL mode, or type of an array."""
    classes: dict[str, int] = field(default_factory=dict)
    """Number of images of each class. Empty without labels."""
    damaged: dict[str, str] = field(default_factory=dict)
    """What is wrong with each damaged image, by name."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of images with equal pixels."""
    low: float = math.inf
    high: float = -math.inf
    """Range of the values as they are trained on; uint8 images are scaled to [-1, 1]."""
    pairs: int | None = None
    """Number of images with a conditioning image, neither of which is damaged. None without conditioning images."""
    conditions: Counter[str] = field(default_factory=Counter)
    """Number of conditioning images of each shape, CxHxW."""
    sigma_data: float = math.nan
    """Standard deviation of the values of up to MEASURED evenly spaced images."""

    def as_json(self) -> dict[str, Any]:
        """The contents as plain values. Figures that are unknown, because there is no valid image, are null."""
        known = math.isfinite(self.low)
        return {
            "data": self.data,
            "name": self.name,
            "images": self.images,
            "shapes": dict(self.shapes.most_common()),
            "modes": dict(self.modes.most_common()),
            "classes": self.classes,
            **({} if self.pairs is None else {"pairs": self.pairs, "condition_shapes": dict(self.conditions)}),
            "damaged": self.damaged,
            "duplicates": self.duplicates,
            "range": [self.low, self.high] if known else None,
            "sigma_data": self.sigma_data if math.isfinite(self.sigma_data) else None,
        }

    def lines(self) -> list[str]:
        """The contents as text."""
        found = [
            f"{self.images:,} images in {self.data} (data.name={self.name})",
            f"shapes: {_counted(self.shapes)}",
            f"modes: {_counted(self.modes)}",
            f"classes: {len(self.classes) or 'none'}"
            + (f": {_counted(Counter(self.classes))}" if self.classes else ""),
        ]
        if self.pairs is not None:
            found.append(f"pairs: {self.pairs:,}; shapes of the conditioning images: {_counted(self.conditions)}")
        if math.isfinite(self.low):
            found.append(f"values: {self.low:g} to {self.high:g}; sigma_data {self.sigma_data:.3g}")
        extra = sum(len(group) - 1 for group in self.duplicates)
        found.append(f"duplicates: {f'{extra} images have the pixels of another' if extra else 'none'}")
        found += [f"  {' = '.join(group[:4])}{' = ...' if group[4:] else ''}" for group in self.duplicates[:LISTED]]
        found.append(f"damaged: {len(self.damaged) or 'none'}")
        found += [f"  {why}" for why in list(self.damaged.values())[:LISTED]]
        if max(len(self.duplicates), len(self.damaged)) > LISTED:
            found.append("--json names all of them")
        return found


def inspect(config: DataConfig) -> Contents:
    """Read all images of a data set. Damaged ones are listed.

    Raises ConfigError and DataError if the data set itself cannot be opened, which includes a conditioning image of a
    data set of pairs that is missing.
    """
    from tqdm import tqdm

    found = Contents(config.path or config.name, config.name)
    seen, others, labels, names, found.images = _opened(config)
    measured = set(measured_ids(found.images).tolist())
    groups: dict[bytes, list[str]] = {}
    total = np.zeros(3)
    with tqdm(seen, total=found.images, desc="images", unit="image", disable=None) as bar:
        for index, each in enumerate(bar):
            if others is not None:
                _add_pair(found, each, next(others))
            if each.error:
                found.damaged[each.name] = each.error
                continue
            found.shapes[each.shape] += 1
            found.modes[each.mode] += 1
            found.low, found.high = min(found.low, each.low), max(found.high, each.high)
            groups.setdefault(each.digest, []).append(each.name)
            if index in measured:
                total += each.moments
    found.duplicates = [group for group in groups.values() if len(group) > 1]
    if total[0] > 1:
        found.sigma_data = math.sqrt(max(0.0, (total[2] - total[1] ** 2 / total[0]) / (total[0] - 1)))
    if labels is not None:
        counts = np.bincount(labels, minlength=len(names))
        found.classes = {names[label] if names else str(label): int(count) for label, count in enumerate(counts)}
    return found


def _add_pair(found: Contents, image: _Seen, condition: _Seen) -> None:
    """Count an image with its conditioning image."""
    found.pairs = (found.pairs or 0) + (not image.error and not condition.error)
    if condition.error:
        found.damaged[condition.name] = condition.error
    else:
        found.conditions[condition.shape] += 1


def _opened(config: DataConfig) -> tuple[Iterator[_Seen], Iterator[_Seen] | None, Labels | None, list[str], int]:
    """The images, the conditioning images of pairs, the labels, the names of the classes and the number of images."""
    if config.name in FILES:
        files = open_files(config)
        others = open_conditions(config, files)
        second = None if others is None else _files(others)
        return _files(files), second, files.found.labels, files.found.class_names, len(files)
    images = ImageDataset(load_dataset(config))
    labels = np.zeros(len(images), np.int64) if images.labelled else None
    second = _array(images, None, conditions=True) if images.paired else None
    return _array(images, labels), second, labels, images.class_names, len(images)


def _files(files: ImageFiles) -> Iterator[_Seen]:
    def one(index: int) -> _Seen:
        return _file(files, index)

    return in_parallel(one, range(len(files)), min(8, os.cpu_count() or 1))


def _file(files: ImageFiles, index: int) -> _Seen:
    from PIL import Image

    name = files.name(index)
    try:
        data = files.read(index)
        with Image.open(io.BytesIO(data), formats=pictures.FORMATS) as image:
            mode, gray = image.mode, pictures.is_gray(image)
        pixels = pictures.pixels(decode(data, name, gray=gray))
    except DataError as error:
        return _Seen(name, str(error))
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, zlib.error and others
        return _Seen(name, f"cannot read {name} as an image ({error})")
    return _seen(name, mode, pixels.astype(np.float32) / 127.5 - 1, pixels)


def _array(images: ImageDataset, labels: Labels | None, *, conditions: bool = False) -> Iterator[_Seen]:
    """The samples of an array, or their conditioning images. The labels are entered into `labels`."""
    for index in range(len(images)):
        name = f"{'the conditioning image of ' if conditions else ''}sample {index}"
        try:
            pixels, own = images.read(np.array([index]))
            pixels = pixels[:, images.shape[0] :] if conditions else pixels[:, : images.shape[0]]
        except DataError as error:
            yield _Seen(name, str(error))
            continue
        if own is not None and labels is not None:
            labels[index] = own[0]
        yield _seen(name, "array", pixels[0].numpy(), pixels[0].numpy())


def _seen(name: str, mode: str, values: np.ndarray[Any, Any], pixels: np.ndarray[Any, Any]) -> _Seen:
    """`values` [C, H, W] are those in [-1, 1] of `pixels`."""
    shape = format_shape(pixels.shape)
    digest = hashlib.blake2b(
        np.ascontiguousarray(pixels).tobytes(), digest_size=16, person=shape.encode()[:16]
    ).digest()
    total = float(values.sum(dtype=np.float64))
    squares = float(np.square(values, dtype=np.float64).sum())
    return _Seen(name, "", shape, mode, digest, float(values.min()), float(values.max()), (values.size, total, squares))


def _counted(counts: Counter[str], most: int = 12) -> str:
    named = [f"{name} ({count:,})" for name, count in counts.most_common(most)]
    return ", ".join(named) + (f" and {len(counts) - most} more" if len(counts) > most else "") or "none"
