"""The contract of a network F(noisy image, noise level, conditioning image, label)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from udddm.config import NetworkConfig


class Network(Protocol):
    """A `torch.nn.Module` whose forward pass has this signature."""

    def __call__(
        self,
        noisy: torch.Tensor,
        c_noise: torch.Tensor,
        condition: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """F(noisy image, noise level, conditioning image, label): [B, C, H, W].

        Args:
            noisy: Noisy images [B, C, H, W], scaled to unit variance (`Coefficients.c_in`).
            c_noise: Noise levels [B].
            condition: Conditioning images [B, C, H, W], or None.
            labels: Class labels [B] int64, or None. The label `config.classes` means "no label".
        """


@dataclass(frozen=True)
class NetworkContext:
    """The argument of a network factory, called as `factory(context)` or `factory(context, settings)`."""

    config: NetworkConfig
    """`classes`, `condition` and `dropout` apply to every network; the other keys configure the U-Net."""
    shape: tuple[int, int, int]
    """The shape (C, H, W) of an image."""
    max_frequency: float = 1.0
    """The highest frequency that the embedding of the noise level should resolve, in radians per unit."""
