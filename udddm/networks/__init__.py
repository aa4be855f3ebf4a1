"""Networks F(noisy image, noise level, conditioning image, label), selected by name (`network.name`)."""

from __future__ import annotations

import torch
from torch import nn

from udddm import rng
from udddm.config import NetworkConfig, RunConfig
from udddm.config.plugins import NETWORKS, cannot_take
from udddm.diffusion import schedule
from udddm.errors import ConfigError
from udddm.networks.base import Network, NetworkContext
from udddm.networks.blocks import GroupNorm
from udddm.rng import Stream

__all__ = ["Network", "NetworkContext", "build", "for_run", "outline"]


def build(config: NetworkConfig, shape: tuple[int, int, int], *, max_frequency: float, seed: int) -> nn.Module:
    """The configured network for images [C, H, W], on the CPU, with initial weights that depend only on the arguments.

    The state of the global random number generators does not change: weights are drawn on the CPU, and the state of its
    generator is restored (`torch.manual_seed` would also seed the generators of accelerators). Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return assemble(NetworkContext(config, shape, max_frequency))


def assemble(context: NetworkContext) -> nn.Module:
    """The configured network on PyTorch's current device, with weights from its generator. Raises ConfigError."""
    name = context.config.name
    built = NETWORKS.build(name, context.config.settings, context)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"network.name={name}: it returned a {type(built).__name__}; return a torch.nn.Module")
    if (problem := cannot_take(built.forward, *[None] * 4)) is not None:
        raise ConfigError(
            f"network.name={name}: its forward pass is called as forward(noisy, c_noise, condition, labels): {problem}"
        )
    if next(built.parameters(), None) is None:
        raise ConfigError(f"network.name={name}: the network has no parameters to train")
    return built


def outline(config: NetworkConfig, shape: tuple[int, int, int]) -> nn.Module:
    """The configured network without memory for its weights. Not every custom network supports this. Raises
    ConfigError."""
    with torch.device("meta"):
        return assemble(NetworkContext(config, shape))


def for_run(config: RunConfig, shape: tuple[int, int, int]) -> nn.Module:
    """The network of a run for images [C, H, W], with the run's initial weights. Raises ConfigError."""
    frequency = config.network.max_frequency or schedule.build(config.schedule).max_frequency
    seed = rng.key(config.seed, Stream.INITIAL_WEIGHTS)
    network = build(config.network, shape, max_frequency=frequency, seed=seed)
    if config.train.recompute:
        recompute(network, config.network.name)
    return network


def recompute(network: nn.Module, name: str) -> None:
    """Make normalizations keep only their inputs for the backward pass. Raises ConfigError if there are none."""
    layers = [layer for layer in network.modules() if isinstance(layer, GroupNorm)]
    if not layers:
        raise ConfigError(
            f"train.recompute=true: network.name={name} has no layers to compute again, as unet and ddpmpp have; "
            "remove it, and set train.grad_accumulation to use less memory"
        )
    for layer in layers:
        layer.recompute = True
