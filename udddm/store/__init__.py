"""The x0-state store: a tensor on the device, host memory, or Zarr arrays, behind one contract (docs/store.md)."""

from __future__ import annotations

from udddm.config import StoreConfig
from udddm.config.plugins import STORES
from udddm.errors import ConfigError
from udddm.store.base import StoreContext, StoreCounters, X0Store
from udddm.store.encoding import Encoding
from udddm.store.layout import StateLayout
from udddm.store.repair import Repair
from udddm.store.snapshot import Snapshot

__all__ = [
    "Encoding",
    "Snapshot",
    "StateLayout",
    "StoreContext",
    "StoreCounters",
    "X0Store",
    "build",
    "find",
    "for_objective",
]


def find(config: StoreConfig) -> type[X0Store]:
    """The class of the configured store. Raises ConfigError."""
    found: type[X0Store] = STORES.load(config.kind)  # type: ignore[assignment]
    return found


def for_objective(config: StoreConfig, reads_state: bool) -> StoreConfig:
    """The store of a run whose objective reads the state or not: the configured one, or `none` if it does not.

    Raises ConfigError if the objective reads the state and the configured store does not keep it.
    """
    if not reads_state:
        return config.model_copy(update={"kind": "none", "settings": {}, "url": None})
    if not find(config).keeps_state:
        raise ConfigError(
            f"store.kind={config.kind} keeps no state, and the objective reads it: choose gpu, pinned or zarr (--store)"
        )
    return config


def build(context: StoreContext) -> X0Store:
    """Create one rank's store of a run, not yet started. Raises ConfigError, StoreError."""
    built: X0Store = STORES.build(context.config.kind, context.config.settings, context)
    if context.config.on_corruption == "reinitialize":
        built.repair = Repair(built.counters)
    return built
