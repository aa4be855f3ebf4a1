"""Density and coverage (Naeem et al. 2020, arXiv 2002.09797) as a custom metric.

    PYTHONPATH=examples udddm-evaluate --checkpoint runs/digits --features custom_metric:pixels --count 1000 \\
        --metrics frechet,custom_metric:density_coverage

During training: `--set 'evaluate={every_steps: 1000, features: custom_metric:pixels, metrics: [frechet,
custom_metric:density_coverage]}'`. A metric is a function from a `MetricInput` to a mapping from names to numbers.
They are reported with the other scores; in Python, they are in `Scores.other`.
"""

from __future__ import annotations

import numpy as np
import torch

from udddm.evaluation.metrics import MANIFOLD, MetricInput

NEIGHBORS = 5


def density_coverage(given: MetricInput) -> dict[str, float]:
    """Density and coverage of the samples.

    Density is the number of real images whose neighborhood contains a sample, divided by the expected number. Coverage
    is the fraction of real images with a sample in their neighborhood. The neighborhood of a real image reaches its 5th
    nearest real image.
    """
    real = torch.from_numpy(np.asarray(given.real.probe[-MANIFOLD:], np.float64))
    fake = torch.from_numpy(np.asarray(given.features[:MANIFOLD], np.float64))
    neighbors = min(NEIGHBORS, len(real) - 1)
    radius = torch.cdist(real, real).kthvalue(neighbors + 1, dim=1).values  # the nearest is the image itself
    inside = torch.cdist(real, fake) <= radius[:, None]
    return {
        "density": float(inside.sum(0).double().mean() / neighbors),
        "coverage": float(inside.any(1).double().mean()),
    }


def pixels(images: torch.Tensor) -> torch.Tensor:
    """A feature network for tiny images that returns the pixels: [B, C, H, W] in [-1, 1] -> [B, C * H * W].

    It keeps the example fast and offline. Scores that are comparable with published ones need Inception features.
    """
    return images.flatten(1)
