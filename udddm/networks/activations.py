"""The memory of activations, counted and not measured: what the backward pass needs of the forward pass."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from udddm.config import NetworkConfig
from udddm.networks import NetworkContext, assemble, recompute

_SIZES = (2, 4)
"""Two numbers of images: what autograd keeps once, such as casts of the weights, is not part of the difference."""


class _Kept:
    """Bytes of the tensors that autograd saves, each storage once."""

    def __init__(self) -> None:
        self._alive: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._alive[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._alive.values())


def bytes_per_image(
    config: NetworkConfig, shape: tuple[int, int, int], precision: str, recomputed: bool = False
) -> int:
    """Bytes that a training pass keeps per image of `shape` (C, H, W), with autocast unless `precision` is fp32.

    `recomputed`: with `train.recompute`.

    Nothing is computed or allocated. The peak of a step is higher by the largest intermediate results.
    Raises ConfigError for an invalid network.
    """
    counts = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = assemble(NetworkContext(config, shape))
        if recomputed:
            recompute(network, config.name)
        for images in _SIZES:
            image, level = torch.zeros(images, *shape), torch.zeros(images)
            labels = torch.zeros(images, dtype=torch.int64) if config.classes else None
            kept = _Kept()
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
            with autocast, saved_tensors_hooks(kept.pack, lambda tensor: tensor):
                network(image, level, image if config.conditioned else None, labels)
            counts.append(kept.bytes)
    return (counts[1] - counts[0]) // (_SIZES[1] - _SIZES[0])
