"""Images and masks that a user gives to a trained model as files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from udddm.data import pictures
from udddm.data.encoded import SUFFIXES, decode, require_pillow
from udddm.data.folder import split_names
from udddm.errors import DataError

_BOX = re.compile(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*")


def read_images(place: Path, shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    """The images [N, *shape] at `place`: an image file, a folder of them, or an .npy file.

    Those in a folder and its subfolders are sorted by path, as in a data set (`udddm.data.folder`).

    Image files give uint8; `shape` (C, H, W) is what a model needs. Raises DataError, which names the file, for one
    that cannot be read or has another size, and OSError.
    """
    if not place.exists():
        raise DataError(f"{place} does not exist: give an image file, a folder of them, or an .npy file")
    if place.suffix == ".npy":
        return _read_array(place, shape)
    require_pillow(str(place))
    files = [place]
    if place.is_dir():
        files = [place / name for name in split_names(_names(place))[0]]
        if not files:
            raise DataError(f"{place} has no image files ({', '.join(SUFFIXES)}); name another folder")
    if shape[0] not in (1, 3):
        raise DataError(
            f"{place}: an image file has 1 or 3 channels, and the model needs {shape[0]}: give an .npy file"
        )
    return np.stack([_read_image(file, shape) for file in files])


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _read_image(file: Path, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    pixels = pictures.pixels(decode(file.read_bytes(), str(file), gray=shape[0] == 1))
    _check_size(file, pixels.shape[1:], shape)
    return pixels


def _check_size(file: Path, found: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    if found != shape[1:]:
        raise DataError(
            f"{file} has {found[1]}x{found[0]} pixels (width x height), but this needs {shape[2]}x{shape[1]}: crop or "
            "resize it"
        )


def _read_array(file: Path, shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[1:] != shape or not len(array):
        raise DataError(f"{file} has shape {list(array.shape)}, but this needs [N, {', '.join(map(str, shape))}]")
    return array


def read_mask(text: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """A mask [H, W] bool: white parts of an image file, or a rectangle `x,y,width,height` in pixels from the top left.

    Raises DataError for a mask of another size than images of `shape` (C, H, W), a rectangle that is not inside, and a
    mask that marks nothing; OSError.
    """
    mask = np.zeros(shape[1:], bool)
    if box := _BOX.fullmatch(text):
        x, y, width, height = map(int, box.groups())
        if x + width > shape[2] or y + height > shape[1]:
            raise DataError(
                f"--mask {text}: the rectangle x,y,width,height is not inside of {shape[2]}x{shape[1]} pixels"
            )
        mask[y : y + height, x : x + width] = True
    else:
        file = Path(text).expanduser()
        if not file.is_file():
            raise DataError(f"--mask {text}: give an existing image file, or a rectangle x,y,width,height in pixels")
        require_pillow(text)
        mask = _read_image(file, (1, *shape[1:]))[0] >= 128
    if not mask.any():
        raise DataError(f"--mask {text} marks no pixel: the white pixels of the file are generated")
    return torch.from_numpy(mask)
