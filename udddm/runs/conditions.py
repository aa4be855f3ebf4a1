"""The conditioning images of a run that come from its data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from udddm.config import RunConfig
from udddm.data import ImageDataset
from udddm.diffusion.conditions import ConditionImages
from udddm.errors import DataError

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
