"""Checks the arguments of `PerSampleState`, also against those recorded with its snapshots."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from udddm import store as stores
from udddm.backends.distributed.ranks import Ranks
from udddm.config import StoreConfig
from udddm.config.plugins import STORES
from udddm.errors import CheckpointError, ConfigError, StoreError
from udddm.files import load_json, lock_file, make_directory, write_json
from udddm.order import Order
from udddm.store.packing import Packing

RECORD = "per-sample.json"
"""The file next to the snapshots that has the id of the state, its tensors and its order."""
_ARGUMENTS = {"batch": "batch_size", "lanes": "order.lanes", "chunk": "order.chunk", "window": "order.window"}
"""The arguments of `PerSampleState` that set the values of `Order.fingerprint`, where the names differ."""


def store_config(store: str | StoreConfig, url: str | Path | None) -> StoreConfig:
    """The configuration of the store. Raises ConfigError for settings that do not apply or have no effect."""
    if isinstance(store, StoreConfig):
        if url is not None:
            raise ConfigError("url: give it in the StoreConfig, store=StoreConfig(kind='zarr', url=...)")
        config = store
    else:
        try:
            config = StoreConfig(kind=STORES.check(store), url=None if url is None else str(url))
        except ValueError as error:
            raise ConfigError(f"store: {error}") from None
    if "dtype" in config.model_fields_set:
        raise ConfigError("store.dtype has no effect here: every tensor has its own dtype; leave it out")
    if not stores.find(config).keeps_state:
        raise ConfigError(f"store={config.kind!r} keeps no state: choose gpu, pinned or zarr")
    in_memory = config.kind in ("gpu", "pinned")
    if config.url is None and not in_memory:
        raise ConfigError(f"url: {config.kind} needs a location, such as url='runs/state' or 's3://bucket/state'")
    if config.url is not None and in_memory:
        raise ConfigError(f"url={config.url!r} has no effect with store={config.kind!r}; leave it out, or use zarr")
    return config


def current_ranks(device: str | torch.device) -> Ranks:
    """This process among those of the default process group of torch.distributed, if there is one.

    Raises ConfigError if there is no such device.
    """
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={str(device)!r}: {error}") from error
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    return Ranks(0, 1, chosen)


_LOCKS: set[int] = set()
"""The descriptors of the locks that this process holds."""


def _drop_locks() -> None:
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_drop_locks)  # a worker of a DataLoader would keep the lock of a killed process


@contextmanager
def sole_user(directory: Path) -> Iterator[None]:
    """Create a directory and keep other processes from using it. A file system without locks detects none.

    Raises StoreError if another process uses it, and OSError if it cannot be written.
    """
    make_directory(directory)
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    _LOCKS.add(descriptor)
    try:
        try:
            lock_file(descriptor)
        except BlockingIOError:
            raise StoreError(f"{directory} is in use by another process: end it, or choose another directory") from None
        yield
    finally:
        _LOCKS.discard(descriptor)
        os.close(descriptor)


def recorded_id(directory: Path, packing: Packing, order: Order, current: str) -> str:
    """The id recorded in the directory of the snapshots; if there is none, `current` or a new id is recorded.

    `current` is the id of the state; "" if it has none yet. Raises ConfigError if the directory has the snapshots of
    another state, naming the arguments that differ, and CheckpointError if its record is damaged.
    """
    own = {"tensors": packing.describe(), "order": order.fingerprint()}
    file = directory / RECORD
    if not file.exists():
        created = current or uuid.uuid4().hex
        write_json(file, {"id": created, **own})
        return created
    record = load_json(file, "id", *own)
    found, there = record["id"], record["order"]
    if not isinstance(found, str) or not isinstance(there, dict):
        raise CheckpointError(f"cannot read {file}: it is damaged; restore it from a copy")
    differing = [
        f"{_ARGUMENTS.get(key, key)} is {there.get(key)} there and {value} here"
        for key, value in own["order"].items()
        if there.get(key) != value
    ]
    if record["tensors"] != own["tensors"]:
        differing.append(f"tensors are {record['tensors']} there and {own['tensors']} here")
    another = f"{directory} has the snapshots of another state"
    if differing:
        raise ConfigError(f"{another}: {'; '.join(differing)}. Give the same arguments, or another directory and url")
    if current and found != current:
        raise ConfigError(f"{another}: call resume() with it before the first read(), or choose another directory")
    return found
