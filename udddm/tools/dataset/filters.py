"""Crops and resizing filters, as the programs that made published data sets have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from udddm.errors import ConfigError

Size = tuple[int, int]
"""Width and height in pixels."""


def parse_size(text: str) -> Size:
    """The size `N` (a square) or `HxW`. Raises ConfigError."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1 << 16 for part in parts):
        raise ConfigError(f"size {text!r}: write a number of pixels, such as 64, or HEIGHTxWIDTH, such as 64x96")
    return int(parts[-1]), int(parts[0])


def adm(image: Any, size: Size) -> Any:
    """That of ADM (Dhariwal & Nichol 2021; `center_crop_arr` in openai/guided-diffusion, image_datasets.py).

    The image is halved by a box filter while both sides are at least twice the target's, resized by a bicubic filter so
    that it covers the target, and cropped to its center. EDM2 calls it center-crop-dhariwal. ImageNet 64 and 256 in the
    literature are made like this. For a square target it gives the pixels of the original.
    """
    from PIL.Image import Resampling

    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def edm(image: Any, size: Size) -> Any:
    """That of EDM (Karras et al. 2022; `--transform=center-crop` in dataset_tool.py of NVlabs/edm): the largest central
    part with the proportions of the target, resized by a Lanczos filter.

    EDM crops to a square, which is the same for a square target.
    """
    from PIL.Image import Resampling

    width, height = size
    if image.width * height >= image.height * width:  # too wide
        part = max(1, image.height * width // height), image.height
    else:
        part = image.width, max(1, image.width * height // width)
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    return image.crop((left, top, left + part[0], top + part[1])).resize(size, Resampling.LANCZOS)


def lanczos(image: Any, size: Size) -> Any:
    """The entire image, resized by a Lanczos filter, which changes its proportions (dataset_tool.py of NVlabs/edm
    without `--transform`)."""
    from PIL.Image import Resampling

    return image if image.size == size else image.resize(size, Resampling.LANCZOS)


FILTERS: dict[str, Callable[[Any, Size], Any]] = {"adm": adm, "edm": edm, "lanczos": lanczos}
