"""Pixels of PIL images as a viewer shows them: gray or RGB, 8 bits per channel.

Both the folder data set and PIL images from a user's data set are converted here, so a file gives the same pixels
either way. Pillow is imported only when needed.
"""

from __future__ import annotations

import re
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from udddm.errors import DataError

GRAY_MODES = ("1", "L", "LA", "La")  # PIL's modes without color and with at most 8 bits

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""Pillow's formats that are decoded, whatever the name of a file. Others may start programs, as EPS does."""

_ORIENTATION = 0x0112
_LATE_CHUNKS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""PNG chunks that may contain an orientation."""


def check_depth(image: Any, name: str) -> None:
    """Raise DataError for a PIL image with more than 8 bits per channel, whose lower bits PIL would drop.

    PIL opens 16-bit RGB in mode RGB. The bit depth of the file is visible only before the pixels are decoded.
    """
    mode = image.mode
    deep = mode == "F" or mode.startswith("I")
    for tile in getattr(image, "tile", None) or ():
        parameters = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        largest = parameters[-1] if str(tile[0]).startswith("ppm") else 0
        deep |= any(re.search(r";16[BLN]", part) is not None for part in parameters if isinstance(part, str))
        deep |= isinstance(largest, int) and largest > 255
    if deep:
        raise DataError(f"{name} has more than 8 bits per channel (PIL mode {mode}): convert it to 8 bits")


def orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8. It is 1 if there is none or the EXIF data are corrupt, as in a viewer."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a corrupt block raises SyntaxError, struct.error, KeyError and others
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def shown_size(image: Any, file: IO[bytes]) -> tuple[int, int]:
    """Width and height as shown, of an image whose pixels are not decoded yet. It was opened from `file`."""
    width, height = image.size
    if width == height:
        return width, height
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"} & set(image.info):
        # Pillow decodes all pixels to find EXIF data after them, which is slow for a large folder.
        position = file.tell()
        late = _has_late_chunk(file)
        file.seek(position)
        if not late:
            return width, height
    return (height, width) if image.format != "TIFF" and orientation(image) >= 5 else (width, height)


def _has_late_chunk(file: IO[bytes]) -> bool:
    """Whether a PNG file has text or EXIF data after its pixels."""
    file.seek(8)
    pixels = False
    while len(header := file.read(8)) == 8:
        kind = header[4:]
        if kind == b"IEND":
            return False
        pixels = pixels or kind == b"IDAT"
        if pixels and kind in _LATE_CHUNKS:
            return True
        file.seek(int.from_bytes(header[:4], "big") + 4, 1)
    return False


def is_gray(image: Any) -> bool:
    """Whether a PIL image has no color."""
    return image.mode in GRAY_MODES


def shown(image: Any, *, gray: bool, name: str) -> Any:
    """A PIL image as a viewer shows it, in mode L or RGB: rotated according to EXIF, with transparent parts on white.

    Raises DataError for more than 8 bits per channel.
    """
    check_depth(image, name)
    image.load()  # only now does Pillow rotate a TIFF, and find EXIF data after the pixels of a PNG
    turned = _turned(image, orientation(image))
    if turned.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in turned.info:
        turned = _on_white(turned)
    mode = "L" if gray else "RGB"
    return turned if turned.mode == mode else turned.convert(mode)


def _turned(image: Any, turn: int) -> Any:
    from PIL.Image import Transpose

    if turn == 1:
        return image
    return image.transpose(
        {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }[turn]
    )


def _on_white(image: Any) -> Any:
    from PIL import Image

    gray = is_gray(image)
    image = image.convert("RGBA")
    if image.getextrema()[3][0] < 255:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB").convert("L") if gray else image.convert("RGB")


def central_square(image: Any, size: int) -> Any:
    """The central square of a PIL image, resized to `size` x `size` (Lanczos), as dataset_tool.py of EDM crops."""
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Resampling.LANCZOS)


def pixels(image: Any) -> npt.NDArray[np.uint8]:
    """The pixels of a PIL image of mode L or RGB, uint8 [C, H, W]."""
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
