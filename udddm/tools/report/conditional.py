"""Samples of a model with `data.condition`, next to their conditioning images and the real images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from udddm import image_grid
from udddm.data import ImageDataset
from udddm.runs.conditions import Examples, examples
from udddm.runs.model import Model

SHOWN = 12
"""Samples of the data set in a figure."""
CONDITION, REAL = "conditioning images", "real images"
"""What the rows of a figure show besides generated images."""


def chosen(model: Model, dataset: ImageDataset, count: int = SHOWN) -> Examples:
    """Evenly spaced samples of the data set of a model with `data.condition`. Raises DataError, ConfigError."""
    ids = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(np.int64))
    return examples(model.config, dataset, ids.tolist())


def sampled(model: Model, given: Examples, evaluations: int = 1) -> torch.Tensor:
    """The images [n, C, H, W] that a model draws for examples, with the labels of the samples."""
    labels = given.labels if model.config.network.classes else None
    return torch.from_numpy(model.sample(given.seeds, steps=evaluations, labels=labels, conditions=given.given))


def rows(model: Model, given: Examples, evaluations: tuple[int, ...] = (1, 2, 4)) -> Iterator[tuple[str, torch.Tensor]]:
    """The rows of a figure, as (label, images [n, C, H, W]): conditioning images, samples, real images."""
    yield CONDITION, given.shown
    for count in evaluations:
        yield f"{count} network evaluation{'s' if count > 1 else ''}", sampled(model, given, count)
    yield REAL, given.real


def strips(model: Model, given: Examples, side: int = 56) -> list[dict[str, Any]]:
    """The rows as values of a page: `label` and `png`, of one line of images each."""
    return [
        {"label": label, "png": image_grid.png(images, columns=len(images), side=side)}
        for label, images in rows(model, given)
    ]
