"""The cost of a network per image, counted rather than measured: parameters and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from udddm.config import NetworkConfig
from udddm.networks import NetworkContext, assemble


@dataclass(frozen=True)
class Cost:
    """Floating-point operations per image of convolutions, linear layers and attention.

    A multiply-add counts as two operations. Normalizations and activations are not counted: they are limited by memory
    bandwidth and contribute about one percent of the total.
    """

    parameters: int
    forward: int
    """Operations of a forward pass."""
    training: int
    """Operations of a forward and a backward pass."""


def cost(config: NetworkConfig, shape: tuple[int, int, int]) -> Cost:
    """The cost of the configured network for images of `shape` (C, H, W).

    Nothing is allocated: the network is on the meta device. Raises ConfigError.
    """
    with torch.device("meta"):
        network = assemble(NetworkContext(config, shape))
        image, level = torch.zeros(1, *shape), torch.zeros(1)
        labels = torch.zeros(1, dtype=torch.int64) if config.classes else None
    condition = image if config.conditioned else None
    counts = []
    for training in (False, True):
        # The counter does not support the fused attention kernel of CPUs, but does support its separate operations.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training):
            output = network(image, level, condition, labels)
            if training:
                output.sum().backward()
        counts.append(counter.get_total_flops())
    return Cost(sum(p.numel() for p in network.parameters()), *counts)
