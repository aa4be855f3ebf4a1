"""Distances between two sets of features [N, D], float64 on the host. Features are rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Features = npt.NDArray[np.floating[Any]]
Array = npt.NDArray[np.float64]

MANIFOLD = 2000
"""Images of either side on which precision and recall are computed."""
KERNEL = 10_000
"""Images of the data set that KID draws its subsets from."""
COLLAPSED = 0.05
"""Samples whose features vary by less than this share of what the data's vary are nearly all alike: a collapse."""


def moments(features: Features) -> tuple[Array, Array]:
    """Mean [D] and covariance [D, D] (unbiased)."""
    rows = np.asarray(features, np.float64)
    return rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False))


def frechet(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017). On Inception features this is FID.

    The trace of the root is the sum of the roots of the eigenvalues of C_a C_b, which are real and not negative.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


def kernel_distance(
    real: Features, fake: Features, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and deviation over random subsets of the unbiased MMD^2 with kernel (x.y / D + 1)^3.

    On Inception features this is KID (Binkowski et al. 2018).
    """
    size = min(size, len(real), len(fake))
    generator = np.random.default_rng(seed)
    dimension = real.shape[1]

    def kernel(x: Array, y: Array) -> Array:
        root: Array = x @ y.T / dimension + 1
        return root * root * root  # `** 3` is a power of floats: many times slower

    found = []
    for _ in range(subsets):
        x = np.asarray(real[generator.choice(len(real), size, replace=False)], np.float64)
        y = np.asarray(fake[generator.choice(len(fake), size, replace=False)], np.float64)
        within = sum(float(k.sum() - np.trace(k)) for k in (kernel(x, x), kernel(y, y))) / (size * (size - 1))
        found.append(within - 2 * float(kernel(x, y).mean()))
    return float(np.mean(found)), float(np.std(found))


def inception_score(logits: Features, splits: int = 10) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) of `splits` equal parts: mean and deviation (Salimans et al. 2016)."""
    scores = []
    for part in np.array_split(np.asarray(logits, np.float64), splits):
        shifted = part - part.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        p = np.exp(log_p)
        scores.append(float(np.exp((p * (log_p - np.log(p.mean(0) + 1e-300))).sum(1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Features, fake: Features, k: int = 3) -> tuple[float, float]:
    """The share of samples within the data's manifold, and of the data within the samples' (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its points that reach their `k`-th nearest neighbour.
    """
    a, b = (torch.from_numpy(np.ascontiguousarray(rows)).double() for rows in (real, fake))

    def covered(points: torch.Tensor, manifold: torch.Tensor) -> float:
        nearest = min(k + 1, len(manifold))
        radius = torch.cat(
            [torch.cdist(part, manifold).kthvalue(nearest, dim=1).values for part in torch.split(manifold, 1024)]
        )
        inside = torch.cat([(torch.cdist(part, manifold) <= radius).any(1) for part in torch.split(points, 1024)])
        return float(inside.double().mean())

    return covered(b, a), covered(a, b)


def spread(real: tuple[Array, Array], fake: tuple[Array, Array]) -> float:
    """The samples' total variance over the data's; below `COLLAPSED` the samples are nearly all alike."""
    return float(np.trace(fake[1]) / max(float(np.trace(real[1])), 1e-12))


@dataclass(frozen=True)
class Reference:
    """A data set in a feature space."""

    mean: Array
    covariance: Array
    probe: Features
    """[at most KERNEL, D]: features of images drawn at random, the last MANIFOLD of them for precision and recall."""

    @property
    def moments(self) -> tuple[Array, Array]:
        return self.mean, self.covariance


@dataclass(frozen=True)
class MetricInput:
    """What a metric is given: `metric(given)` returns its figures by name."""

    features: Features
    """[N, D]: of the samples."""
    logits: Features | None
    """[N, K]: of the samples, where the feature network has them."""
    real: Reference
    distance: str
    """What the Frechet distance is called in this feature space: fid or fd."""


def frechet_metric(given: MetricInput) -> dict[str, Any]:
    """`evaluate.metrics`: frechet."""
    return {given.distance: frechet(moments(given.features), given.real.moments)}


def kid_metric(given: MetricInput) -> dict[str, Any]:
    """`evaluate.metrics`: kid."""
    kid, deviation = kernel_distance(given.real.probe, given.features)
    return {"kid": kid, "kid_deviation": deviation}


def precision_recall_metric(given: MetricInput) -> dict[str, Any]:
    """`evaluate.metrics`: precision-recall."""
    precision, recall = precision_recall(given.real.probe[-MANIFOLD:], given.features[:MANIFOLD])
    return {"precision": precision, "recall": recall}


def spread_metric(given: MetricInput) -> dict[str, Any]:
    """`evaluate.metrics`: spread, and whether the samples have collapsed."""
    found = spread(given.real.moments, moments(given.features))
    return {"spread": found, "collapsed": bool(found < COLLAPSED)}


def inception_score_metric(given: MetricInput) -> dict[str, Any]:
    """`evaluate.metrics`: inception-score, where the feature network has logits."""
    if given.logits is None:
        return {}
    found, deviation = inception_score(given.logits)
    return {"inception_score": found, "inception_score_deviation": deviation}
