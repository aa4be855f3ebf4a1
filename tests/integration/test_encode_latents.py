"""examples/data/encode_latents.py: latents are scaled by measured moments, and train as a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from udddm.config import DataConfig
from udddm.data import ArrayImages, ImageDataset, load_dataset

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


def test_latents_are_centered_and_scaled_by_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import encode_latents

    pixels = np.random.default_rng(0).integers(0, 256, (70, 3, 16, 16), dtype=np.uint8)
    images = ImageDataset(ArrayImages(pixels, np.arange(70) % 5))
    weight = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 4], [1, -1, 0]])[:, :, None, None]
    offset = torch.tensor([1.5, -0.7, 0.5, 0.7])
    seen: list[float] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        seen.extend((float(batch.min()), float(batch.max())))
        return torch.nn.functional.conv2d(torch.nn.functional.avg_pool2d(batch, 4), weight, offset)

    target = tmp_path / "latents.zarr"
    clamped = encode_latents.write(images, encode, target, measured=70, batch=16, shard=32)
    assert min(seen) == -1 and max(seen) == 1  # images in [-1, 1], for which the moments are stated
    expected = encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    group = zarr.open_group(target, mode="r")
    mean, std = (np.array(group.attrs[name])[:, None, None] for name in ("mean", "std"))
    np.testing.assert_allclose(mean[:, 0, 0], expected.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(std[:, 0, 0], expected.std((0, 2, 3)), rtol=1e-3)
    assert "mean of each channel: [1.4993" in capsys.readouterr().out
    assert clamped == 0
    dataset = ImageDataset(load_dataset(DataConfig(name="array", path=str(target))))
    latents, labels = dataset.batch(np.arange(70))
    np.testing.assert_allclose(latents.std((0, 2, 3)), 0.125, rtol=1e-2)
    np.testing.assert_allclose(latents.numpy() * group.attrs["deviations"] * std + mean, expected.numpy(), atol=1e-2)
    assert labels is not None and (labels == np.arange(70) % 5).all()
