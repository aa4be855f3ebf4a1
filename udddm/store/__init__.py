"""The x0-state store: a tensor on the device, host memory, or Zarr arrays, behind one contract (docs/store.md)."""

from __future__ import annotations

from udddm.config import StoreConfig
from udddm.config.plugins import STORES
from udddm.store.base import StoreContext, StoreCounters, X0Store
from udddm.store.encoding import Encoding
from udddm.store.layout import StateLayout
from udddm.store.repair import Repair
from udddm.store.snapshot import Snapshot

__all__ = ["Encoding", "Snapshot", "StateLayout", "StoreContext", "StoreCounters", "X0Store", "build", "find"]


def find(config: StoreConfig) -> type[X0Store]:
    """The class of the configured store. Raises ConfigError."""
    found: type[X0Store] = STORES.load(config.kind)  # type: ignore[assignment]
    return found


def build(context: StoreContext) -> X0Store:
    """Create one rank's store of a run, not yet started. Raises ConfigError, StoreError."""
    built: X0Store = STORES.build(context.config.kind, context.config.settings, context)
    if context.config.on_corruption == "reinitialize":
        built.repair = Repair(built.counters)
    return built
