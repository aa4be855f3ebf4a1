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
        """F: noisy images [B, C, H, W], noise levels [B], conditioning images [B, C, H, W] or None, and class labels
        [B] int64 or None, to [B, C, H, W].

        `noisy` is scaled to unit variance (`Coefficients.c_in`). The label `config.classes` stands for "no label".
        """


@dataclass(frozen=True)
class NetworkContext:
    """What a factory of networks is given: `factory(context)`, or `factory(context, settings)`."""

    config: NetworkConfig
    """`classes`, `condition` and `dropout` hold for every network; the other keys are those of the U-Net."""
    shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    max_frequency: float = 1.0
    """The highest frequency that the embedding of the noise level should resolve, radians per unit."""
