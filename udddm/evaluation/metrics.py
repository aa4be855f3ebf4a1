"""Distances between two sets of features [N, D], computed in float64 on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from udddm.errors import ConfigError

Features = npt.NDArray[np.floating[Any]]
Array = npt.NDArray[np.float64]

MANIFOLD = 2000
"""The number of images, of the data and of the samples, used for precision and recall."""
KERNEL = 10_000
"""The number of images of the data set that KID draws its subsets from."""
NEED_FEATURES = ("kid", "precision-recall")
"""Metrics of the package that need features of the reference, not only their mean and covariance."""
COLLAPSED = 0.05
"""Below this ratio of the samples' variance to the data's, nearly all samples are alike: the model has collapsed."""


def moments(features: Features) -> tuple[Array, Array]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D]."""
    rows = np.asarray(features, np.float64)
    return rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False))


def frechet(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017). On Inception features this is FID.

    The trace of the square root is the sum of the square roots of the eigenvalues of C_a C_b, which are those of the
    symmetric matrix S C_b S with S = C_a^(1/2). Symmetric eigenvalues are real, and faster than general ones.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = np.linalg.eigh(cov_a)
    half = vectors * np.sqrt(values.clip(0))
    roots = np.sqrt(np.linalg.eigvalsh(half.T @ cov_b @ half).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


def kernel_distance(
    real: Features, fake: Features, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the unbiased MMD^2 with kernel (x.y / D + 1)^3.

    On Inception features this is KID (Binkowski et al. 2018).
    """
    size = min(size, len(real), len(fake))
    generator = np.random.default_rng(seed)
    dimension = real.shape[1]

    def kernel(x: Array, y: Array) -> Array:
        root: Array = x @ y.T / dimension + 1
        return root * root * root  # `** 3` calls pow, which is many times slower

    found = []
    for _ in range(subsets):
        x = np.asarray(real[generator.choice(len(real), size, replace=False)], np.float64)
        y = np.asarray(fake[generator.choice(len(fake), size, replace=False)], np.float64)
        within = sum(float(k.sum() - np.trace(k)) for k in (kernel(x, x), kernel(y, y))) / (size * (size - 1))
        found.append(within - 2 * float(kernel(x, y).mean()))
    return float(np.mean(found)), float(np.std(found))


def inception_score(logits: Features, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of exp(mean KL(p(y|x) || p(y))) over `splits` equal parts (Salimans et al. 2016).

    `logits` are [N, K]. Parts are in the order of the samples; with fewer samples than parts, each is a part.
    """
    scores = []
    for part in np.array_split(np.asarray(logits, np.float64), min(splits, len(logits))):
        shifted = part - part.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        p = np.exp(log_p)
        scores.append(float(np.exp((p * (log_p - np.log(p.mean(0) + 1e-300))).sum(1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Features, fake: Features, k: int = 3) -> tuple[float, float]:
    """The fraction of samples within the data's manifold, and of the data within the samples' manifold.

    The manifold of a set is the union of balls around its points; each reaches the point's `k`-th nearest neighbor
    (Kynkaanniemi et al. 2019).
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
    """The total variance of the samples divided by the data's. Below `COLLAPSED`, nearly all samples are alike."""
    return float(np.trace(fake[1]) / max(float(np.trace(real[1])), 1e-12))


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set in a feature space."""

    mean: Array
    """[D]."""
    covariance: Array
    """[D, D]."""
    rows: Features | None
    """[at most KERNEL, D]: features of random images; None if only the mean and the covariance are known."""

    @property
    def probe(self) -> Features:
        """`rows`. The last MANIFOLD of them are used for precision and recall.

        Raises ConfigError if the reference has none.
        """
        if self.rows is None:
            raise ConfigError(
                "this metric needs features of the reference, of which only mean and covariance are known: give a "
                "reference file with images (arr_0), or leave the metric out of --metrics (evaluate.metrics)"
            )
        return self.rows

    @property
    def moments(self) -> tuple[Array, Array]:
        """(mean, covariance)."""
        return self.mean, self.covariance


@dataclass(frozen=True)
class MetricInput:
    """The input of a metric: `metric(given)` returns a mapping from names to numbers."""

    features: Features
    """Features of the samples, [N, D]."""
    logits: Features | None
    """Logits of the samples, [N, K], or None if the feature network has none."""
    real: Reference
    """Statistics of the data set."""
    distance: str
    """The name of the Frechet distance in this feature space: fid or fd."""


def frechet_metric(given: MetricInput) -> dict[str, Any]:
    """The metric frechet: Frechet distance to the data set (`frechet`)."""
    return {given.distance: frechet(moments(given.features), given.real.moments)}


def kid_metric(given: MetricInput) -> dict[str, Any]:
    """The metric kid: kernel distance to the data set (`kernel_distance`)."""
    kid, deviation = kernel_distance(given.real.probe, given.features)
    return {"kid": kid, "kid_deviation": deviation}


def precision_recall_metric(given: MetricInput) -> dict[str, Any]:
    """The metric precision-recall (`precision_recall`)."""
    precision, recall = precision_recall(given.real.probe[-MANIFOLD:], given.features[:MANIFOLD])
    return {"precision": precision, "recall": recall}


def spread_metric(given: MetricInput) -> dict[str, Any]:
    """The metric spread, and whether the samples have collapsed (`spread`)."""
    found = spread(given.real.moments, moments(given.features))
    return {"spread": found, "collapsed": bool(found < COLLAPSED)}


def inception_score_metric(given: MetricInput) -> dict[str, Any]:
    """The metric inception-score (`inception_score`). Empty if the feature network has no logits."""
    if given.logits is None:
        return {}
    found, deviation = inception_score(given.logits)
    return {"inception_score": found, "inception_score_deviation": deviation}
