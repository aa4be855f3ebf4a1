"""How old stored targets are, relative to what they teach."""

from __future__ import annotations

import torch
from torch import nn

from udddm import rng
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients
from udddm.objectives.base import Visits

LIMIT = 0.2
"""The ratio above which a stored target teaches mostly its own age."""


@torch.no_grad()
def age_norms(
    network: nn.Module,
    x0: torch.Tensor,
    state: torch.Tensor,
    output: torch.Tensor,
    visits: Visits,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two sums over the visits whose target is the x0-state s, whose ratio is the relative age of the state: [2].

    The first is of |s - f(x_r)|, with f evaluated now at the level r where s was stored, and the second of
    |f(x_sigma) - f(x_r)|, what the visit teaches. `x0`, `state` and `output` = f(x_sigma) are [B, C, H, W]. The network
    evaluates all rows, without gradient. Its conditioning images must not be the x0-states.
    """
    rows, at = visits.stored_rows, visits.coefficients
    assert rows is not None and visits.stored_coefficients is not None and visits.condition != "state"
    below = Coefficients(*at.index_copy(1, rows, visits.stored_coefficients))
    shape = tuple(x0.shape[1:])
    noise = visits.condition == "noise"
    condition = rng.normal(visits.condition_key, shape) if noise else visits.condition_images
    now = denoise(network, add_noise(x0, rng.normal(visits.noise_key, shape), below), below, condition, labels)[rows]
    ages, lessons = ((some[rows] - now).flatten(1).norm(dim=1).sum() for some in (state, output))
    return torch.stack([ages, lessons])
