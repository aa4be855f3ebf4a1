"""Image grids are PNG files that another library can read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from udddm.image_grid import save_image_grid


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_grid_shows_every_image_enlarged_with_a_white_gap(tmp_path: Path, channels: int) -> None:
    images = torch.rand((5, channels, 4, 6), generator=torch.Generator().manual_seed(channels)) * 2.4 - 1.2
    save_image_grid(images, tmp_path / "grid.png", columns=3, side=12)
    with Image.open(tmp_path / "grid.png") as picture:
        picture.verify()  # the checksums of the chunks
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB" and picture.size == (3 * (2 * 6 + 2) + 2, 2 * (2 * 4 + 2) + 2)
        pixels = np.asarray(picture)
    shown = images.clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    expected = np.full(pixels.shape, 255, np.uint8)
    for i, image in enumerate(shown):
        top, left = 2 + 10 * (i // 3), 2 + 14 * (i % 3)
        rgb = image if channels == 3 else np.repeat(image[:1], 3, axis=0)
        expected[top : top + 8, left : left + 12] = rgb.transpose(1, 2, 0).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(pixels, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
