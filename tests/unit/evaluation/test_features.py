"""Feature networks, and the cached statistics of a data set."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from udddm.data import ImageDataset
from udddm.evaluation import evaluate
from udddm.evaluation.features import FeatureNetwork, load_features


def mean_and_deviation(images: torch.Tensor) -> torch.Tensor:
    flat = images.flatten(1)
    return torch.stack([flat.mean(1), flat.std(1)], 1)


def test_statistics_are_cached_per_images_and_network(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (300, 1, 6, 6)).astype(np.float32)
    calls = 0

    def counted(batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += len(batch)
        return mean_and_deviation(batch)

    network = FeatureNetwork("counted", counted, torch.device("cpu"))
    first = evaluate.reference(ImageDataset(images), network, tmp_path)
    assert calls == 304
    again = evaluate.reference(ImageDataset(images), network, tmp_path)
    assert calls == 308  # four for the fingerprint of the network
    for name in ("mean", "covariance", "probe"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    changed = images.copy()
    changed[123, 0, 0, 0] *= 0.5  # one pixel of one image
    evaluate.reference(ImageDataset(changed), network, tmp_path)
    assert calls == 612
    other = FeatureNetwork("counted", lambda batch: 2 * mean_and_deviation(batch), torch.device("cpu"))
    assert np.allclose(evaluate.reference(ImageDataset(images), other, tmp_path).mean, 2 * first.mean)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])  # half written
    assert np.array_equal(evaluate.reference(ImageDataset(images), network, tmp_path).mean, first.mean)


def test_torchscript_files_are_feature_networks(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    path = tmp_path / "network.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module, torch.zeros(1, 1, 8, 8)).save(str(path))
    network = load_features(str(path), torch.device("cpu"))
    features, logits = network(torch.zeros(7, 1, 8, 8))
    assert features.shape == (7, 5) and logits is None
