"""Eq. 3 and Eq. 4 of the paper, and f itself: what every objective has in common.

An objective answers two questions. `plan` says, on the host and ahead of time, what each visit of a sample is: its
noise level, its noise, the weight of x_0 in its target. `__call__` says, on the device, what the visit's loss is and
what the sample's next x0-state is. `plan` is a pure function of (seed, sample, epoch).
"""

from __future__ import annotations

import torch


def pseudo_huber(x: torch.Tensor, y: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """Eq. 4: d(x, y) = sqrt(||x - y||^2 + c^2) - c with the norm over the whole image. [B, C, H, W] twice -> [B].

    `c` is a number or [B]. Written as ||x - y||^2 / (sqrt(||x - y||^2 + c^2) + c), which a large c does not cancel out.
    """
    square = (x - y).square().flatten(1).sum(1)
    return square / ((square + c * c).sqrt() + c)


def adaptive_loss(
    output: torch.Tensor, x0: torch.Tensor, state: torch.Tensor, guide: torch.Tensor, c: float | torch.Tensor
) -> torch.Tensor:
    """Eq. 3 with guide [B] = 1/(n+1): guide * d(f, x0) + (1 - guide) * d(f, state). Returns [B]."""
    return guide * pseudo_huber(output, x0, c) + (1 - guide) * pseudo_huber(output, state, c)
