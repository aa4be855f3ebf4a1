"""Weights of feature networks with random values, in the formats of the published files.

They make every path of an evaluation testable without a download. The figures that they give compare with nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from udddm.data.download import sha256_of
from udddm.evaluation.dinov2 import DINOv2
from udddm.evaluation.inception import Inception
from udddm.files import atomic_save


def random_inception(path: Path, seed: int = 0) -> str:
    """Write weights of Inception to `path`, a state dict with the names and shapes of the published file.

    Returns their SHA-256. Convolutions have He's variance, so that features differ between images.
    """
    with torch.device("meta"):
        network = Inception()
    return _write(path, _drawn(network, seed))


def random_dinov2(path: Path, *, width: int = 128, depth: int = 2, grid: int = 37, seed: int = 0) -> str:
    """Write weights of a DINOv2 network of this size to `path`, as `udddm.evaluation.dinov2.DINOv2` names them.

    Returns their SHA-256.
    """
    with torch.device("meta"):
        network = DINOv2(width, depth, grid)
    return _write(path, _drawn(network, seed))


def _drawn(network: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(seed)
    found = {}
    for name, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith(("running_var", "bn.weight", "norm1.weight", "norm2.weight", "norm.weight", "gamma")):
            values = generator.uniform(0.5, 1.5, shape)
        elif name.endswith(("bias", "running_mean")):
            values = 0.1 * generator.standard_normal(shape)
        else:
            values = generator.standard_normal(shape, np.float32) * (2 / max(1, np.prod(shape[1:]))) ** 0.5
        found[name] = torch.from_numpy(np.asarray(values, np.float32))
        if name.endswith("running_mean"):
            found[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return found


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    atomic_save(path, lambda temporary: torch.save(tensors, temporary))
    return sha256_of(path)
