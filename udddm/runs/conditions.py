"""The conditioning images of a run that come from its data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from udddm.config import RunConfig
from udddm.data import ImageDataset
from udddm.diffusion.conditions import ConditionImages
from udddm.errors import ConfigError, DataError

Rows = Callable[[list[int]], torch.Tensor]
"""The conditioning images [B, C, H, W] of images at B positions among all that are generated."""


def conditions_of(config: RunConfig, dataset: ImageDataset) -> ConditionImages | None:
    """What makes the conditioning images of a run. None if they do not come from the data set.

    Raises DataError unless the data set is paired exactly if `data.condition.kind` is pairs, and ConfigError if the
    kind does not apply to its images.
    """
    kind = config.data.condition.kind
    if dataset.paired and kind != "pairs":
        raise DataError(
            f"the samples of the data set are pairs of images, and data.condition.kind={kind} would ignore the second "
            "one: set data.condition.kind=pairs, or return only the image"
        )
    if kind == "pairs" and not dataset.paired:
        raise DataError(
            "data.condition.kind=pairs: the samples of the data set have no conditioning image; its dataset[i] must "
            "return (image, condition) or (image, condition, label)"
        )
    return ConditionImages(config.data.condition, dataset.shape, config.seed) if config.data.condition.used else None


@dataclass(frozen=True)
class Examples:
    """Samples of a data set with their conditioning images, for n generated images."""

    seeds: list[int]
    """The seeds of the generated images: sample `seed` modulo the number of samples is theirs."""
    real: torch.Tensor
    """The samples, [n, C, H, W] in [-1, 1]."""
    given: torch.Tensor
    """Their conditioning images as a user gives them, [n, *ConditionImages.given_shape], NaN in hidden pixels."""
    shown: torch.Tensor
    """Their conditioning images as pictures, [n, C, H, W] in [-1, 1]: hidden pixels are gray."""
    labels: list[int] | None
    """The labels of the samples, [n]. None without labels."""

    def first(self, count: int) -> Examples:
        """The first `count` of them, or all if there are fewer."""
        labels = None if self.labels is None else self.labels[:count]
        return Examples(self.seeds[:count], self.real[:count], self.given[:count], self.shown[:count], labels)


def examples(config: RunConfig, dataset: ImageDataset, seeds: Sequence[int]) -> Examples:
    """The samples of generated images with `seeds`, and their conditioning images.

    Raises the errors of `conditions_of`, ConfigError for a run without `data.condition`, and those of the data set.
    """
    conditions = conditions_of(config, dataset)
    if conditions is None:
        raise ConfigError("this model is not conditioned on images of its data set")
    ids = np.asarray(seeds, np.int64) % len(dataset)
    stacked, labels = dataset.read(ids)
    real, given = conditions.given(stacked, torch.from_numpy(ids))
    shown = conditions.prepared(given.nan_to_num(nan=0.0))
    return Examples(list(seeds), real, given, shown, None if labels is None else labels.tolist())


def sample_conditions(config: RunConfig, dataset: ImageDataset, seeds: Sequence[int]) -> Rows | None:
    """The conditioning images of generated images: that of seed s is of sample s modulo their number.

    None for a run without. Raises the errors of `conditions_of`; calls raise those of the data set.
    """
    conditions = conditions_of(config, dataset)
    if conditions is None:
        return None
    ids = np.asarray(seeds, np.int64) % len(dataset)

    def rows(wanted: list[int]) -> torch.Tensor:
        chosen = ids[wanted]
        return conditions.split(dataset.read(chosen)[0], torch.from_numpy(chosen))[1]

    return rows
