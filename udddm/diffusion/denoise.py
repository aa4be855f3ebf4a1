"""The steps that training and sampling share: adding noise to images, and denoising them with the network."""

from __future__ import annotations

import torch
from torch import nn

from udddm.diffusion.schedule import Coefficients
from udddm.errors import ConfigError


def append_dims(row: torch.Tensor) -> torch.Tensor:
    """Append singleton dimensions for broadcasting over images: [B] -> [B, 1, 1, 1]."""
    return row[:, None, None, None]


def add_noise(x0: torch.Tensor, eps: torch.Tensor, at: Coefficients) -> torch.Tensor:
    """x_t = alpha x_0 + sigma eps. Images and noise are [B, C, H, W]."""
    return append_dims(at.alpha) * x0 + append_dims(at.sigma) * eps


def denoise(
    network: nn.Module,
    xt: torch.Tensor,
    at: Coefficients,
    condition: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """The estimate of x_0, f = a(t) x_t + b(t) F(condition, x_t, t) (arXiv 2405.21059): [B, C, H, W] float32.

    `xt` and `condition` are [B, C, H, W], and `labels` are [B] int64. Raises ConfigError for a network whose output has
    another shape.
    """
    output: torch.Tensor = network(append_dims(at.c_in) * xt, at.c_noise, condition, labels)
    if not isinstance(output, torch.Tensor) or output.shape != xt.shape:
        found = list(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise ConfigError(f"network.name: the network returned {found}; return a tensor {list(xt.shape)}, as its input")
    return append_dims(at.c_skip) * xt + append_dims(at.c_out) * output.float()
