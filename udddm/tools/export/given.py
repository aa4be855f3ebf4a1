"""Conditioning images and masks as a program gives them to a pipeline: PIL images, arrays or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from udddm.data import pictures
from udddm.data.images import scaled
from udddm.diffusion.conditions import ConditionImages
from udddm.errors import ConfigError


class GivenImages(TypedDict, total=False):
    """The arguments of a pipeline for images that are given."""

    image: Any
    """The conditioning images: a PIL image, a list of them, or an array or tensor [N, C, H, W] as of `Model.sample`."""
    mask_image: Any
    """For `data.condition.kind=mask`: what is generated, the white part of a PIL image or of a list of them, or an
    array or tensor [N, 1, H, W] or [H, W] in [0, 1]."""


def given_conditions(given: Mapping[str, Any], conditions: ConditionImages | None) -> npt.NDArray[Any] | None:
    """The argument `conditions` of `Model.sample` for a model with `conditions`. None without images.

    Raises ConfigError for an unknown argument, an image of another size, a mask that is missing or has no use.
    """
    if unknown := sorted(set(given) - set(GivenImages.__annotations__)):
        raise ConfigError(f"unknown argument {unknown[0]}; images are given as image and mask_image")
    image, mask = given.get("image"), given.get("mask_image")
    hides = conditions is not None and conditions.hides
    if mask is not None and not hides:
        raise ConfigError("mask_image has no effect: this model was not trained with data.condition.kind=mask")
    if image is None or conditions is None:
        return None if image is None else np.asarray(image)  # refused by Model.sample
    images = _array(image, conditions.given_shape, "image")
    if not hides:
        return images
    if mask is None:
        if images.dtype.kind == "f" and np.isnan(images).any():
            return images
        raise ConfigError("this model fills in the hidden part of an image: give that part as mask_image")
    floats = scaled(images, np.arange(len(images))) if images.dtype == np.uint8 else images
    hidden = _array(mask, (1, *conditions.given_shape[1:]), "mask_image")
    white = hidden >= (128 if hidden.dtype == np.uint8 and hidden.max() > 1 else 0.5)
    return np.where(white, np.float32("nan"), floats)


def _array(value: Any, shape: tuple[int, int, int], what: str) -> npt.NDArray[Any]:
    """Images [N, *shape] from PIL images, which become uint8, or from an array or tensor."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        listed = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(hasattr(each, "mode") and hasattr(each, "convert") for each in listed):
            raise ConfigError(f"{what}: give a PIL image, a list of them, or an array or tensor [N, C, H, W]")
        if shape[0] not in (1, 3):
            raise ConfigError(f"{what}: this model needs {shape[0]} channels, which no PIL image has: give an array")
        found = [pictures.pixels(pictures.shown(each, gray=shape[0] == 1, name=what)) for each in listed]
        wrong = next((each for each in found if each.shape != shape), None)
        if wrong is not None:
            raise ConfigError(
                f"{what} has {wrong.shape[2]}x{wrong.shape[1]} pixels (width x height), but this model needs "
                f"{shape[2]}x{shape[1]}: crop or resize it"
            )
        return np.stack(found)
    one = value.shape == shape or (shape[0] == 1 and value.shape == shape[1:])
    array = value.reshape(1, *shape) if one else value
    if array.ndim != 4 or array.shape[1:] != shape:
        raise ConfigError(f"{what}: give [N, {', '.join(map(str, shape))}], not {list(value.shape)}")
    return array
