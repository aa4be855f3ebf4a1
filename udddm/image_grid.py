"""Grids of images as PNG files."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from udddm.files import atomic_write


def save_image_grid(images: torch.Tensor, path: Path, *, columns: int | None = None, side: int = 64) -> None:
    """Write images [N, C, H, W], clamped to [-1, 1], to one PNG file, as `png` encodes them. Raises OSError."""
    encoded = png(images, columns=columns, side=side)
    atomic_write(path, lambda file: file.write(encoded))


def png(images: torch.Tensor, *, columns: int | None = None, side: int = 64) -> bytes:
    """Encode a grid of images, as `pixels` draws it, as PNG."""
    return encode(pixels(images, columns=columns, side=side))


def pixels(images: torch.Tensor, *, columns: int | None = None, side: int = 64) -> npt.NDArray[np.uint8]:
    """A grid of images [N, C, H, W], clamped to [-1, 1], as RGB pixels [height, width, 3].

    Images with three channels are shown as RGB; of any other images, the first channel is shown in gray. Small images
    are enlarged, pixel by pixel, to about `side` pixels. `columns` defaults to a square grid.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    lines = -(-count // columns)
    scale = max(1, round(side / max(height, width)))
    shown = images if channels == 3 else images[:, :1].expand(-1, 3, -1, -1)
    tiles = to_uint8(shown)
    tiles = tiles.repeat(scale, 1).repeat(scale, 2)
    gap = 2
    high, wide = height * scale + gap, width * scale + gap
    canvas = np.full((lines * high + gap, columns * wide + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = divmod(i, columns)
        canvas[gap + y * high :, gap + x * wide :][: high - gap, : wide - gap] = tile
    return canvas


def to_uint8(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Images [N, C, H, W] in [-1, 1], clamped, as pixels [N, H, W, C] from 0 to 255."""
    found: npt.NDArray[np.uint8] = (
        images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    )
    return found


COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's color type by the number of channels: gray, gray and alpha, RGB, RGB and alpha."""


def encode(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode pixels [H, W, C] (C: gray, gray and alpha, RGB, or RGB and alpha) as PNG (ISO/IEC 15948), without filters:
    enlarged pixels compress well anyway."""
    height, width, channels = pixels.shape
    lines = np.zeros((height, 1 + channels * width), np.uint8)  # each line starts with the number of its filter
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">2I5B", width, height, 8, COLOR_TYPES[channels], 0, 0, 0)  # 8 bits, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
