"""The same figures as torch-fidelity on the same PNG files, where that package is installed (it needs torchvision)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from udddm.cli.evaluate import main
from udddm.testing.features import random_inception

COUNT = 20


def package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_fidelity
    except Exception as error:  # without it, or with a torchvision of another torch, which raises RuntimeError
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    return torch_fidelity


def written(directory: Path, images: np.ndarray) -> Path:
    directory.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(directory / f"{number:03}.png")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (400, 1)])
def test_scores_of_png_files_equal_torch_fidelitys(tmp_path: Path, side: int, channels: int) -> None:
    other = package()
    generator = np.random.default_rng(0)
    real = generator.integers(0, 256, (COUNT, side, side, channels), dtype=np.uint8)
    fake = (0.7 * generator.integers(0, 256, real.shape) + 20).astype(np.uint8)
    weights = tmp_path / "w.pth"
    digest = random_inception(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = other.calculate_metrics(
            input1=str(written(tmp_path / "fake", fake)),
            input2=str(written(tmp_path / "real", real)),
            **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
            **dict.fromkeys(("cuda", "cache", "verbose", "samples_shuffle"), False),
            kid_subsets=1,
            kid_subset_size=COUNT,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(weights),
        )
    np.save(tmp_path / "fake.npy", fake.transpose(0, 3, 1, 2))
    out = tmp_path / "scores.json"
    arguments = ["--samples", str(tmp_path / "fake.npy"), "data.name=folder", f"data.path={tmp_path / 'real'}"]
    arguments += ["--inception-weights", f"{weights}#sha256={digest}", "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--device", "cpu", "--json", str(out)]) == 0
    ours = json.loads(out.read_text())
    names = {
        "fd": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean",
        "inception_score_deviation": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    for name, their_name in names.items():
        assert ours[name] == pytest.approx(theirs[their_name], rel=1e-4, abs=1e-6), name
