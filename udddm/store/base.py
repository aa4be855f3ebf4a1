"""The contract of an x0-state store, for one rank (docs/store.md).

The x0-state of generation g is every sample's x_0^(g): epoch g reads it and produces generation g + 1. A store is
opened at a position. In every step, training reads the states of the step's samples and writes their successors:

    store.start(epoch, step, source)
    while training:
        state = store.read()              # [b, C, H, W] float32 on the device, for order.batch_of(lanes, epoch, step)
        store.write(new_state)            # returns at once
    store.snapshot(directory)             # between two steps: all that `start` needs to return to this position
    store.close()

`read` and `write` alternate. The store advances steps and epochs automatically, because it knows the order.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

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
    """Totals since the store was opened: seconds, bytes and events."""

    read_wait: float = 0.0
    write_wait: float = 0.0
    """Of the host, in `read` and `write`."""
    idle: float | None = None
    """The part of both in which the device had nothing to do (udddm/store/idle.py); None: all of it."""
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0
    reads: int = 0
    reinitialized: int = 0
    """Samples of corrupt chunks that were reset to generation 0 (`Repair`)."""
    queued: int = 0
    """Batches that were ready when a step requested the next one, summed over the reads."""
    kept: int = 0
    """Rows that kept their previous value because their successor was not finite (`finite_rows`)."""

    @property
    def waited(self) -> float:
        """Seconds in which the device waited for the store."""
        return self.read_wait + self.write_wait if self.idle is None else self.idle

    def metrics(self, before: StoreCounters, seconds: float) -> dict[str, float]:
        """The metrics of the last `seconds`, at whose start the totals were `before`."""
        read_wait, write_wait = self.read_wait - before.read_wait, self.write_wait - before.write_wait
        moved = self.bytes_read + self.bytes_written - before.bytes_read - before.bytes_written
        return {
            "store_wait_fraction": (self.waited - before.waited) / seconds,
            "store_read_wait_seconds": read_wait,
            "store_write_wait_seconds": write_wait,
            "store_queue_depth": (self.queued - before.queued) / max(1, self.reads - before.reads),
            "store_megabytes_per_second": moved / 1e6 / seconds,
            "store_bytes_read": self.bytes_read,
            "store_bytes_written": self.bytes_written,
            "store_retries": self.retries,
            "store_reinitialized": self.reinitialized,
            "store_kept": self.kept,
        }


def finite_rows(values: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace every row of `values` [b, C, H, W] that is not finite with the row of `before`.

    Also returns the number of replaced rows as a scalar tensor on the device, so that nothing has to synchronize. A
    NaN in the state would spoil its sample at every later visit.
    """
    finite = values.flatten(1).isfinite().all(1)
    return torch.where(finite[:, None, None, None], values, before), (~finite).sum()


class StateSource(Protocol):
    """The x0-state at some position of a run, chunk by chunk, from which a store can be started."""

    encoding: Encoding

    def rows(self, lane: int, chunk: int) -> Rows:
        """The chunk's current rows [n, C, H, W], encoded: generation epoch + 1 where visited in this epoch, else
        generation epoch."""


@dataclass(frozen=True)
class StoreContext:
    """Arguments for creating the store of a run: `Store.create(context)` or `Store.create(context, settings)`."""

    layout: StateLayout
    config: StoreConfig
    location: str | Path
    """`<run>/state`: a directory, or a URL for a run at a URL. It moves with the run."""
    owner: str = ""
    """A description of the run, shown to other runs that try to write to the same location."""
    run_id: str = ""
    """Identifies the run, even after it is moved."""
    guard: Guard | None = None
    """Checks that the run may still write at its URL; None for a run directory, which a lock protects."""


def _with_index(device: torch.device) -> torch.device:
    """`device`, or the current GPU for a "cuda" without an index: threads of a store cannot make that their current
    one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


class X0Store(ABC):
    """Base class of all stores. A custom store implements `start`, `read`, `put`, `rows` and `close`
    (docs/extending.md).

    Failures that concern the user are raised as StoreError, which names the file or key and what to do. A store is
    used by one thread. It may work in the background; the next `read` or `write` raises what failed there.
    """

    keeps_state: ClassVar[bool] = True
    """Whether this store keeps the state. If not, it serves only objectives that do not read it."""

    def __init__(self, layout: StateLayout):
        self.layout, self.order, self.lanes = layout, layout.order, layout.lanes
        self.shape, self.encoding, self.device = layout.shape, layout.encoding, _with_index(layout.device)
        self.counters = StoreCounters()
        self.repair: Repair | None = None
        """Handles corrupt chunks; if None, they raise CorruptChunkError. Set it before `start`."""
        self.epoch = self.step = 0

    def hold(self, ranks: Ranks) -> None:
        """Keep other runs from writing to this store, unless something else already does.

        Called on every rank before `start`. Raises StoreError.
        """
        return

    @classmethod
    def create(cls, context: StoreContext) -> Self:
        """Create the store of a run, not yet started.

        A store with its own settings takes them as the second argument, and names their pydantic model in the class
        attribute `Settings`. Raises ConfigError, StoreError.
        """
        return cls(context.layout)

    @classmethod
    def resident_bytes(cls, layout: StateLayout) -> int:
        """The most memory that the state takes on one rank, in bytes."""
        return layout.state_bytes

    @classmethod
    def memory_kind(cls, device: torch.device) -> str:
        """The kind of memory that holds the `resident_bytes`, such as "host memory"."""
        return "host memory"

    @classmethod
    def shared_location(cls, config: StoreConfig) -> str | None:
        """A path or URL outside the run directory that all ranks must be able to reach, or None."""
        return None

    def describe(self) -> str:
        """Where the state is stored, as shown in the first log lines of a run."""
        return self.memory_kind(self.device)

    @abstractmethod
    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        """Open the store at a position. `source` is None at (0, 0), where generation 0 is computed."""

    @abstractmethod
    def read(self) -> torch.Tensor:
        """The states [b, C, H, W], float32 on the device, of this rank's samples of the next step.

        Padding rows hold arbitrary finite numbers. Raises StoreError, also for a failure in the background.
        """

    def write(self, values: torch.Tensor) -> None:
        """Store the successors [b, C, H, W] of the states that `read` returned, and advance to the next step.

        Padding rows are ignored.
        """
        self.put(values)
        self.step += 1
        if self.step == self.order.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
            self.next_epoch()

    @abstractmethod
    def put(self, values: torch.Tensor) -> None:
        """Store the successors [b, C, H, W] of the states that `read` returned for step (`self.epoch`, `self.step`)."""

    def next_epoch(self) -> None:
        """Called at the end of an epoch; `self.epoch` is already the new one."""
        return

    def initial_rows(self, source: StateSource | None) -> Iterator[tuple[int, int, Rows]]:
        """(lane, chunk, rows) of all of this rank's chunks at the position of `source`, in this store's encoding.

        `start` has to load them. Generation 0 if `source` is None.
        """
        for lane, chunk in self.layout.chunks():
            if source is None:
                samples = self.order.chunk_samples(lane, chunk)
                zero = generation_zero(self.order.seed, samples, self.shape, self.encoding)
                yield lane, chunk, self.encoding.to_array(zero)
            else:
                yield lane, chunk, self.encoding.recode(source.rows(lane, chunk), source.encoding)

    @abstractmethod
    def rows(self, lane: int, chunk: int) -> Rows:
        """A chunk's current rows, as `StateSource.rows`. Only for this rank's lanes, between two steps."""

    def snapshot(self, directory: Path) -> None:
        """Write into `directory` all that `start` needs to return to this position. Durable when it returns.

        By default this is a copy of all of this rank's rows, from which a store of any kind can be started.
        """
        write_full(self, directory)

    def retain(self, generations: set[int]) -> None:
        """Keep the generations that retained checkpoints refer to; others may be deleted once training has passed
        them."""
        return

    def gauges(self) -> dict[str, float]:
        """Current sizes and settings of the store by name, for metrics."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stop background work. Anything that is not part of a snapshot may be lost."""

    def sha256(self) -> str:
        """Fingerprint of the state of this rank's lanes: SHA-256 of its stored bytes in slot order."""
        digest = hashlib.sha256()
        for lane, chunk in self.layout.chunks():
            digest.update(self.rows(lane, chunk).tobytes())
        return digest.hexdigest()
