"""Metrics compared with torchmetrics on the same features, and with their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from udddm.evaluation import metrics


class Network(nn.Module):
    """A feature network for torchmetrics, which needs `num_features`."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 12)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1).to(self.linear.weight.dtype)).relu()


@pytest.fixture(scope="module")
def two() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(600, 1, 4, 4, generator=g), 0.8 * torch.randn(500, 1, 4, 4, generator=g) + 0.2


def rows(images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return Network()(images).numpy()


def test_frechet_distance_equals_torchmetrics(two: tuple[torch.Tensor, torch.Tensor]) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Network()).set_dtype(torch.float64)
    metric.update(two[0], real=True)
    metric.update(two[1], real=False)
    ours = metrics.frechet(metrics.moments(rows(two[0])), metrics.moments(rows(two[1])))
    assert ours == pytest.approx(float(metric.compute()), abs=1e-3)
    assert ours > 0.1


@pytest.mark.filterwarnings("ignore:Metric `Kernel:UserWarning")
def test_kernel_distance_equals_torchmetrics(two: tuple[torch.Tensor, torch.Tensor]) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=Network(), subsets=1, subset_size=500)
    metric.update(two[0][:500], real=True)
    metric.update(two[1], real=False)
    ours, _ = metrics.kernel_distance(rows(two[0][:500]), rows(two[1]), subsets=1, size=500)
    assert ours == pytest.approx(float(metric.compute()[0]), abs=1e-3)


def test_inception_score_of_certain_and_of_uniform_predictions() -> None:
    certain = 50 * np.eye(10)[np.arange(1000) % 10]
    assert metrics.inception_score(certain)[0] == pytest.approx(10, rel=1e-6)
    assert metrics.inception_score(np.zeros((1000, 10)))[0] == pytest.approx(1, rel=1e-9)
    assert metrics.inception_score(np.tile(certain[:1], (100, 1)))[0] == pytest.approx(1, rel=1e-9)


def test_precision_and_recall_follow_their_definition() -> None:
    g = np.random.default_rng(0)
    real, fake = g.normal(size=(60, 3)), 0.3 * g.normal(size=(50, 3))

    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        inside = 0
        for p in points:
            for m in manifold:
                radius = np.sort(np.linalg.norm(manifold - m, axis=1))[3]
                if np.linalg.norm(p - m) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    precision, recall = metrics.precision_recall(real, fake)
    assert precision == covered(fake, real) and recall == covered(real, fake)
    assert precision > recall  # a shrunken set is precise and covers little


def test_a_collapse_is_distinguished_from_variety() -> None:
    g = np.random.default_rng(0)
    real = metrics.moments(g.normal(size=(500, 4)))
    assert metrics.spread(real, metrics.moments(g.normal(size=(500, 4)))) == pytest.approx(1, abs=0.2)
    assert metrics.spread(real, metrics.moments(1 + 0.01 * g.normal(size=(500, 4)))) < metrics.COLLAPSED
