"""What a degraded image says of the image: block means, luma, and a part of the pixels.

Editing (editing.py) keeps these values, and a network may be trained with them as its conditioning image
(conditions.py).
"""

from __future__ import annotations

import torch

from udddm.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in luma (ITU-R BT.601)."""
_BISECTIONS = 60
"""Enough for the precision of float64."""


def block_means(images: torch.Tensor, factor: int) -> torch.Tensor:
    """The means of blocks of `factor` x `factor` pixels: [B, C, H, W] -> [B, C, H / factor, W / factor]."""
    return torch.nn.functional.avg_pool2d(images, factor)


def enlarged(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Every pixel as a block of `factor` x `factor` pixels: [B, C, h, w] -> [B, C, h factor, w factor]."""
    count, channels, height, width = images.shape  # not len(), which would be a constant of an export
    blocks = images[:, :, :, None, :, None].expand(count, channels, height, factor, width, factor)
    return blocks.reshape(count, channels, height * factor, width * factor)


def luma(images: torch.Tensor) -> torch.Tensor:
    """The luma of RGB images: [B, 3, H, W] -> [B, 1, H, W]."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def check_factor(factor: int, shape: tuple[int, int, int], key: str) -> None:
    """Raise ConfigError, which names `key`, unless `factor` divides the sides of images of `shape` (C, H, W)."""
    _, height, width = shape
    if factor < 2 or height % factor or width % factor:
        common = [n for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0]
        choices = f"give one of {', '.join(map(str, common))}" if common else "no factor does"
        raise ConfigError(f"{key} {factor}: it must be at least 2 and divide {height}x{width} pixels; {choices}")


def with_mean(values: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The nearest values within [-1, 1] whose weighted mean is `target`.

    `values` [..., n], `weights` [n] (positive, with sum 1) and `target` [...] within [-1, 1]. This is the orthogonal
    projection onto the intersection of a hyperplane and a box: clamp(values + c weights), where c solves for the mean,
    which increases with c, and is found by bisection in float64.
    """
    wide, w = values.double(), weights.to(values.device, torch.float64)
    goal = target.double()
    reach = ((1 + wide.abs()) / w).amax(-1) + 1  # with c = reach, every value is clamped to 1
    low, high = -reach, reach
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = ((wide + middle[..., None] * w).clamp(-1, 1) * w).sum(-1) < goal
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (wide + ((low + high) / 2)[..., None] * w).clamp(-1, 1).to(values.dtype)
