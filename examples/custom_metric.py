"""Density and coverage (Naeem et al. 2020, arXiv 2002.09797) as a metric of your own.

    PYTHONPATH=examples udddm-evaluate --checkpoint runs/digits --features custom_metric:pixels --count 1000 \\
        --metrics frechet,custom_metric:density_coverage

While training: `--set 'evaluate={every_steps: 1000, features: custom_metric:pixels, metrics: [frechet,
custom_metric:density_coverage]}'`. A metric is a function from a `MetricInput` to its figures by name; they are
written next to the others, and `Scores.other` has them in Python.
"""

from __future__ import annotations

import numpy as np
import torch

from udddm.evaluation.metrics import MANIFOLD, MetricInput

NEIGHBORS = 5


def density_coverage(given: MetricInput) -> dict[str, float]:
    """Density: how many real images' neighborhoods a sample lies in, over the number expected. Coverage: the share of
    real images with a sample in their neighborhood. A neighborhood reaches to the 5th nearest real image."""
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
    """A feature network for images of a few pixels: the pixels themselves. [B, C, H, W] in [-1, 1] -> [B, C * H * W].

    It makes the example fast and offline. Figures that are to be compared with others' need Inception's features.
    """
    return images.flatten(1)
