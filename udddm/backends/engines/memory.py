"""The memory that training takes on a GPU, counted before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig
from udddm.config.plugins import NETWORKS
from udddm.errors import ConfigError
from udddm.networks import activations, outline

ALLOCATED = 1.12
"""The bytes that a training pass takes on a GPU over those that autograd keeps: 1.11 to 1.12 for four presets on an
H200 without `train.recompute` (docs/gpu.md, P10)."""
CONTEXT = 1e9
"""Bytes of CUDA's context and the workspaces of its libraries, approximately."""
CERTAIN = 1.1
"""A run that needs so many times a GPU's memory is not started."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    fixed: float
    """Weights, gradients, moments, averages, casts of the weights, and CUDA itself."""
    per_image: float
    """Activations of one image of a micro-batch."""

    def of(self, images: int) -> float:
        """The bytes of a micro-batch of `images`."""
        return self.fixed + images * self.per_image

    def accumulation(self, rows: int, limit: float, beyond: int = 0) -> int | None:
        """The smallest `train.grad_accumulation` above `beyond` with which a step of `rows` images on this GPU takes at
        most `limit` bytes. None if there is none."""
        return next((n for n in range(beyond + 1, rows + 1) if rows % n == 0 and self.of(rows // n) <= limit), None)


def needed(config: RunConfig, shape: tuple[int, int, int]) -> Memory:
    """Count the memory of a run with the torch engine on images of `shape` (C, H, W), without its x0-state.

    Takes some seconds for a large network. Raises ConfigError for an invalid network, and any error of a network of
    someone else that cannot run without data.
    """
    train = config.train
    parameters = sum(p.numel() for p in outline(config.network, shape).parameters())
    fixed = parameters * 4 * (4 + len(train.averages)) + CONTEXT
    if train.precision != "fp32":
        fixed += parameters * 2
    kept = activations.bytes_per_image(config.network, shape, train.precision, train.recompute)
    return Memory(fixed, ALLOCATED * kept)


def recompute_suffices(config: RunConfig, shape: tuple[int, int, int], images: int, limit: float) -> bool:
    """Whether a micro-batch of `images` takes at most `limit` bytes with `train.recompute`, which is not set."""
    train = config.train
    if train.recompute or train.compile:
        return False
    chosen = config.model_copy(update={"train": train.model_copy(update={"recompute": True})})
    try:
        return needed(chosen, shape).of(images) <= limit
    except ConfigError:  # a network that has nothing to compute again
        return False


def check(config: RunConfig, shape: tuple[int, int, int], ranks: Ranks) -> None:
    """Raise ConfigError, naming the accumulation that helps, if a step certainly does not fit this rank's GPU.

    Networks of someone else and DeepSpeed, which may keep less on each GPU, are not checked.
    """
    if ranks.device.type == "cuda":
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        check_fits(config, shape, ranks.world_size, total, torch.cuda.get_device_name(ranks.device))


def check_fits(config: RunConfig, shape: tuple[int, int, int], world: int, total: float, device: str) -> None:
    """`check` for a GPU with `total` bytes."""
    if NETWORKS.is_import(config.network.name) or config.engine.name != "torch":
        return
    memory, parts, rows = needed(config, shape), config.train.grad_accumulation, config.train.batch_size // world
    images = rows // parts
    if memory.of(images) <= CERTAIN * total:
        return
    more = memory.accumulation(rows, 0.95 * total, parts)
    advice = f"set train.grad_accumulation={more} (it is {parts})" if more else "use a smaller network or a larger GPU"
    if recompute_suffices(config, shape, images, 0.95 * total):
        advice += ", or set train.recompute=true"
    raise ConfigError(
        f"the network does not fit: a micro-batch of {images} images takes about {memory.of(images) / 1e9:.1f} GB, and "
        f"{device} has {total / 1e9:.1f} GB; {advice}"
    )
