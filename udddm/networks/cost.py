"""What a network costs an image, counted and not measured: parameters and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from udddm.config import NetworkConfig
from udddm.networks import NetworkContext, assemble


@dataclass(frozen=True)
class Cost:
    """Operations of convolutions, linear layers and attention for one image; a multiplication and an addition are two.

    Normalisations and activations are left out: they are a matter of memory bandwidth, and a per cent of the sum.
    """

    parameters: int
    forward: int
    training: int
    """Forward and backward pass."""


def cost(config: NetworkConfig, shape: tuple[int, int, int]) -> Cost:
    """The cost of the network for images [C, H, W]. Takes no memory: its tensors have shapes and no contents."""
    with torch.device("meta"):
        network = assemble(NetworkContext(config, shape))
        image, level = torch.zeros(1, *shape), torch.zeros(1)
        labels = torch.zeros(1, dtype=torch.int64) if config.classes else None
    condition = image if config.conditioned else None
    counts = []
    for training in (False, True):
        # The fused attention kernel of CPUs is one that the counter does not know; attention in single steps it does.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training):
            output = network(image, level, condition, labels)
            if training:
                output.sum().backward()
        counts.append(counter.get_total_flops())
    return Cost(sum(p.numel() for p in network.parameters()), *counts)
