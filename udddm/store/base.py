"""The contract of an x0-state store, for one rank (docs/store.md).

The x0-state of generation g is every sample's x_0^(g): epoch g reads it and produces generation g + 1. A store is
opened at a position, then, step after step, asked for the states of the step's samples and given their successors:

    store.start(epoch, step, source)
    while training:
        state = store.read()              # [b, C, H, W] float32 on the device, for order.batch_of(lanes, epoch, step)
        store.write(new_state)            # returns at once
    store.snapshot(directory)             # between two steps: all that `start` needs to come back here
    store.close()

`read` and `write` alternate; the store counts steps and turns epochs by itself, because the order is known.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch

from udddm.config import StoreConfig
from udddm.storage.guard import Guard
from udddm.store.encoding import Encoding, Rows, generation_zero
from udddm.store.layout import StateLayout
from udddm.store.snapshot import write_full

if TYPE_CHECKING:
    from udddm.backends.distributed.ranks import Ranks
    from udddm.store.repair import Repair


@dataclass
class StoreCounters:
    """What a store has done since it was opened: seconds, bytes and events."""

    read_wait: float = 0.0
    write_wait: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0
    reads: int = 0
    reinitialized: int = 0
    """Samples of damaged chunks that began again (`Repair`)."""
    queued: int = 0
    """Batches that were ready when the step asked for the next, summed over the reads."""
    kept: int = 0
    """Rows that stayed as they were, for their successors were not finite (`finite_rows`)."""


def finite_rows(values: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` [b, C, H, W], with the rows of `before` where a row is not finite, and how many these are: a scalar on
    the device, which nothing waits for. A state that is not a number would spoil its sample at every later visit."""
    finite = values.flatten(1).isfinite().all(1)
    return torch.where(finite[:, None, None, None], values, before), (~finite).sum()


class StateSource(Protocol):
    """The x0-state at some position of a run, chunk by chunk: what a store can be started from."""

    encoding: Encoding

    def rows(self, lane: int, chunk: int) -> Rows:
        """The chunk's current rows: generation epoch + 1 where visited in this epoch, else generation epoch."""


@dataclass(frozen=True)
class StoreContext:
    """What a store of a run is created from: `Store.create(context)`, or `Store.create(context, settings)`."""

    layout: StateLayout
    config: StoreConfig
    location: str | Path
    """`<run>/state`: a directory, or a URL for a run at a URL. It moves with the run."""
    owner: str = ""
    """What names the run to others that want to write to the same place."""
    run_id: str = ""
    """Identifies the run wherever it is moved to."""
    guard: Guard | None = None
    """Whether the run may still write at its URL; None for a run directory, which a lock protects."""


class X0Store(ABC):
    """A store of your own implements `start`, `read`, `put`, `rows` and `close` (docs/extending.md).

    Failures that the user has to know of are StoreError, with the file or key and what to do. A store is used by one
    thread; what it does in the background is its own affair, and is reported by the next `read` or `write`.
    """

    def __init__(self, layout: StateLayout):
        self.layout, self.order, self.lanes = layout, layout.order, layout.lanes
        self.shape, self.encoding, self.device = layout.shape, layout.encoding, layout.device
        self.counters = StoreCounters()
        self.repair: Repair | None = None
        """What is done about damaged chunks; None: CorruptChunkError. To be set before `start`."""
        self.epoch = self.step = 0

    def hold(self, ranks: Ranks) -> None:
        """On every rank, before `start`: keep other runs from writing, where nothing else does. Raises StoreError."""
        return

    @classmethod
    def create(cls, context: StoreContext) -> Self:
        """The store of a run, not yet started. A store with settings of its own takes them as the second argument, and
        names their pydantic model as the class attribute `Settings`. Raises ConfigError, StoreError."""
        return cls(context.layout)

    @classmethod
    def resident_bytes(cls, layout: StateLayout) -> int:
        """The most memory that the state takes on a rank, in bytes."""
        return layout.state_bytes

    @classmethod
    def memory_kind(cls, device: torch.device) -> str:
        """Where those bytes are, such as "host memory"."""
        return "host memory"

    @classmethod
    def shared_location(cls, config: StoreConfig) -> str | None:
        """A path or URL outside the run directory that all ranks must be able to reach; None where there is none."""
        return None

    def describe(self) -> str:
        """Where the state lives, as the first lines of a run show it."""
        return self.memory_kind(self.device)

    @abstractmethod
    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        """Open at a position. `source` is None at (0, 0): generation 0 is computed."""

    @abstractmethod
    def read(self) -> torch.Tensor:
        """The states [b, C, H, W], float32 on the device, of this rank's samples of the next step.

        Rows of padding hold arbitrary finite numbers. Raises StoreError, also for a failure in the background.
        """

    def write(self, values: torch.Tensor) -> None:
        """Take the successors [b, C, H, W] of what `read` gave; padding is ignored. Moves to the next step."""
        self.put(values)
        self.step += 1
        if self.step == self.order.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
            self.next_epoch()

    @abstractmethod
    def put(self, values: torch.Tensor) -> None:
        """Store the successors [b, C, H, W] of what `read` gave for the step (`self.epoch`, `self.step`)."""

    def next_epoch(self) -> None:
        """Called when an epoch is over, with `self.epoch` the new one."""
        return

    def initial_rows(self, source: StateSource | None) -> Iterator[tuple[int, int, Rows]]:
        """(lane, chunk, rows) of all own chunks at the position of `source`, in this store's encoding: what `start` has
        to take up. Generation 0 where `source` is None."""
        for lane, chunk in self.layout.chunks():
            if source is None:
                samples = self.order.chunk_samples(lane, chunk)
                zero = generation_zero(self.order.seed, samples, self.shape, self.encoding)
                yield lane, chunk, self.encoding.to_array(zero)
            else:
                yield lane, chunk, self.encoding.recode(source.rows(lane, chunk), source.encoding)

    @abstractmethod
    def rows(self, lane: int, chunk: int) -> Rows:
        """A chunk's current rows, as `StateSource.rows`. For an own lane, between two steps."""

    def snapshot(self, directory: Path) -> None:
        """Write into `directory` what `start` needs to come back to this position. Durable when it returns.

        By default this is a copy of all own rows, from which a store of any kind can be started.
        """
        write_full(self, directory)

    def retain(self, generations: set[int]) -> None:
        """The generations that kept checkpoints refer to; others may go once training has passed them."""
        return

    def gauges(self) -> dict[str, float]:
        """What the store has chosen or holds at this moment, by name: for metrics."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stop background work. What was not part of a snapshot may be lost."""

    def sha256(self) -> str:
        """The fingerprint of the own lanes' state: its stored bytes in slot order."""
        digest = hashlib.sha256()
        for lane, chunk in self.layout.chunks():
            digest.update(self.rows(lane, chunk).tobytes())
        return digest.hexdigest()
