"""The x0-state store: a tensor on the device, host memory, or Zarr arrays, behind one contract (docs/store.md)."""

from __future__ import annotations

import torch

from udddm.config import StoreConfig
from udddm.errors import CorruptChunkError, StoreError
from udddm.order import Order
from udddm.runs.run import Run, run_id
from udddm.storage.base import local_path
from udddm.store.base import StoreCounters, X0Store, finite_rows
from udddm.store.device import DeviceStore
from udddm.store.encoding import Encoding
from udddm.store.pinned import MemoryTable, PinnedStore
from udddm.store.repair import Repair
from udddm.store.snapshot import Snapshot
from udddm.store.zarr import ZarrStore

__all__ = [
    "CorruptChunkError",
    "Encoding",
    "Snapshot",
    "StoreCounters",
    "StoreError",
    "X0Store",
    "build",
    "finite_rows",
]


REMOTE_THREADS = 8
"""Requests in flight each way to object storage until a run has measured what it needs."""


def build(
    config: StoreConfig, order: Order, lanes: range, shape: tuple[int, ...], device: torch.device, run: Run
) -> X0Store:
    """The configured store of a run for one rank, not yet started."""
    opened = _open(config, order, lanes, shape, device, run)
    if config.on_corruption == "reinitialize":
        opened.repair = Repair(opened.counters)
    return opened


def _open(
    config: StoreConfig, order: Order, lanes: range, shape: tuple[int, ...], device: torch.device, run: Run
) -> X0Store:
    encoding = Encoding(config.dtype)
    if config.kind == "gpu":
        return DeviceStore(order, lanes, shape, encoding, device)
    memory = None if config.memory_mb is None else config.memory_mb * 10**6
    if config.kind == "pinned":
        table = MemoryTable(order, lanes, shape, encoding)
        return PinnedStore(
            order,
            lanes,
            shape,
            encoding,
            device,
            table,
            threads=config.threads,
            prefetch=config.prefetch,
            memory=memory,
        )
    url, default = (config.url, False) if config.url else (run.state, True)
    return ZarrStore(
        order,
        lanes,
        shape,
        encoding,
        device,
        url,
        default=default,
        owner=run.identity,
        run=run_id(run.path),
        guard=run.guard,
        compression=config.compression,
        threads=config.threads,
        prefetch=config.prefetch,
        memory=memory,
        first_threads=2 if local_path(url) else REMOTE_THREADS,
    )
