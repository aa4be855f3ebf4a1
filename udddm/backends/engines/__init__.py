"""Engines, selected by name (`engine.name`): they turn losses into optimizer steps."""

from __future__ import annotations

from torch import nn

from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines import numerics
from udddm.backends.engines.base import Engine, EngineContext, samples_a_part
from udddm.config import RunConfig
from udddm.config.plugins import ENGINES

__all__ = ["Engine", "EngineContext", "build", "find", "samples_a_part"]


def find(config: RunConfig) -> type[Engine]:
    """The class of the configured engine. Raises ConfigError."""
    found: type[Engine] = ENGINES.load(config.engine.name)  # type: ignore[assignment]
    return found


def build(network: nn.Module, config: RunConfig, ranks: Ranks, total_steps: int) -> Engine:
    """The configured engine for a network on the host. Raises ConfigError."""
    samples_a_part(config, ranks.world_size)
    numerics.configure(config.train)
    find(config).check(config, ranks.world_size)
    context = EngineContext(network, config, ranks, total_steps)
    built: Engine = ENGINES.build(config.engine.name, config.engine.settings, context)
    return built
