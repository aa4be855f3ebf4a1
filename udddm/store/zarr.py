"""The `zarr` store: one immutable Zarr array per generation, on disk, read and written one chunk at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from udddm.backends.distributed.lease import follow
from udddm.config import StoreConfig
from udddm.errors import CorruptChunkError, StoreError
from udddm.storage import local_path, open_object_store
from udddm.storage.guard import Guard, Guards
from udddm.storage.lease import Lease
from udddm.store.autotune import Limits
from udddm.store.base import StateSource, StoreContext
from udddm.store.compression import Compression
from udddm.store.encoding import Rows
from udddm.store.generations import Checksums, Generations
from udddm.store.layout import StateLayout
from udddm.store.pipeline import ChunkTable, HostStore
from udddm.store.snapshot import Snapshot, write_reference

if TYPE_CHECKING:
    from udddm.backends.distributed.ranks import Ranks


class GenerationTable(ChunkTable):
    """Stores chunks in `Generations`, and keeps the checksums of the generations that are being written.

    `run_id`: id of the owning run; empty for a store inside a run directory, whose location identifies it.
    """

    def __init__(self, generations: Generations, lanes: range, run_id: str = ""):
        self.generations, self.lanes, self.run_id = generations, lanes, run_id
        self.retained: set[int] = set()
        self._lock = threading.Lock()
        self._begin_lock = threading.Lock()
        self._busy: list[int] = []
        self._passed = 0  # generations below are not needed by the current epoch
        self._written: dict[tuple[int, int], Checksums] = {}
        self._begun: set[int] = set()

    def open(self, epoch: int, step: int, source: StateSource | None) -> None:
        """Continue in place if `source` refers to this same store, else write the state of `source` to it."""
        stored = self.generations
        at_home = self._holds(source)
        stored.check_owner(self.run_id, own=at_home)
        if isinstance(source, Snapshot) and at_home:
            self._check_present(source)
        stored.create(self.run_id, own=at_home)
        if isinstance(source, Snapshot) and not at_home:
            source.follow(stored, self.run_id, self.lanes)
            at_home = self._holds(source)
            if not at_home:
                self._check_readable(source)  # before generations are deleted
        in_place = at_home and source is not None and source.encoding.name == stored.encoding.name
        for old in stored.existing():
            if old > epoch + 1 or (not in_place and (old >= epoch or old not in self.retained)):
                stored.delete(old, self.lanes)
        for lane in self.lanes:
            stored.reopen(epoch + 1, lane)
        if in_place:
            assert isinstance(source, Snapshot)
            if epoch:
                for lane in self.lanes:
                    source.base(lane, restore=True)  # raises unless it is complete and the same
            self._written = {(epoch + 1, lane): source.written(lane) for lane in self.lanes}
        elif source is not None:
            self._import(epoch, step, source)

    def _holds(self, source: StateSource | None) -> bool:
        """Whether `source` refers to this store."""
        here = self.generations.objects.uri("")
        return isinstance(source, Snapshot) and source.form == "reference" and source.location == here

    def _check_present(self, source: Snapshot) -> None:
        """Raise StoreError unless the store has all chunks that a checkpoint refers to.

        Called before anything is created or deleted: training would only read some of them an epoch later. Their
        contents are checked when they are read. With a repair, chunks may be missing, but not all of them.
        """
        missing = [(lane, *each) for lane in self.lanes for each in source.missing(self.generations, lane)]
        if missing and len(missing) == sum(len(source.referred(lane)) for lane in self.lanes):
            raise self._not_here(source, f"x0-state generation {source.epoch + 1} has no chunk there")
        if missing and self.generations.repair is None:
            lane, generation, chunk = missing[0]
            where = self.generations.objects.uri(self.generations.chunk_key(generation, lane, chunk))
            raise CorruptChunkError(generation, lane, chunk, where, "it is missing")

    def _not_here(self, source: Snapshot, why: object) -> StoreError:
        return StoreError(
            f"{why}. The checkpoint {source.directory.parent} refers to the x0-state at {source.location}, and "
            f"{self.generations.objects.uri('')} does not hold it. If the store was moved, give its new location "
            "as store.url; nothing was deleted"
        )

    def _check_readable(self, source: Snapshot) -> None:
        """Raise StoreError unless the generation that a checkpoint refers to exists."""
        if source.form != "reference" or not source.epoch:
            return
        try:
            for lane in self.lanes:
                source.base(lane)
        except StoreError as error:
            raise self._not_here(source, error) from error

    def _import(self, epoch: int, step: int, source: StateSource) -> None:
        """Write the state of another store as generation `epoch`, and the finished windows as the next generation."""
        order, encoding = self.generations.order, self.generations.encoding
        for lane in self.lanes:
            finished = set()
            for index in range(order.num_windows(lane)):
                if order.window_span(lane, epoch, index)[1] <= step * order.samples_per_lane_step:
                    finished.update(order.window_chunks_of(lane, epoch, index))
            for chunk in range(order.num_chunks(lane)):
                rows = encoding.recode(source.rows(lane, chunk), source.encoding)
                if epoch:
                    self.save(epoch, lane, chunk, rows)
                if chunk in finished:
                    self.save(epoch + 1, lane, chunk, rows)
            if epoch:
                self.finish(epoch, lane)

    def load(self, generation: int, lane: int, chunk: int) -> Rows:
        if generation == 0:
            return self.generations.zero(lane, chunk)
        with self._lock:
            expected = self._written.get((generation, lane), {}).get(chunk)
        try:
            if expected is None:
                expected = self.generations.record(generation, lane)[chunk]
            return self.generations.state(generation, lane, chunk, expected)
        except StoreError:
            self.generations.objects.guard.confirm()  # raises the actual reason if a successor has deleted it
            raise

    def save(self, generation: int, lane: int, chunk: int, rows: Rows) -> None:
        with self._writing(generation) as needed:
            if needed:
                self._begin(generation)
                checksum = self.generations.write(generation, lane, chunk, rows)
                with self._lock:
                    self._written.setdefault((generation, lane), {})[chunk] = checksum

    @contextmanager
    def _writing(self, generation: int) -> Iterator[bool]:
        """Whether the generation is still needed; it is not once the epoch that reads it is over.

        A generation is not deleted while it is being written, because the pending write would recreate part of it.
        """
        with self._lock:
            needed = generation >= self._passed
            if needed:
                self._busy.append(generation)
        try:
            yield needed
        finally:
            if needed:
                with self._lock:
                    self._busy.remove(generation)

    def _begin(self, generation: int) -> None:
        with self._begin_lock:
            if generation not in self._begun:
                self.generations.begin(generation)
                self._begun.add(generation)

    def written(self, generation: int) -> dict[int, Checksums]:
        with self._lock:
            return {lane: dict(self._written.get((generation, lane), {})) for lane in self.lanes}

    def base(self, generation: int) -> dict[int, int]:
        """`Generations.record_checksum` of each lane of a complete generation; empty for generation 0."""
        return {lane: self.generations.record_checksum(generation, lane) for lane in self.lanes if generation}

    def finish(self, generation: int, lane: int) -> None:
        with self._writing(generation) as needed:
            if needed:
                with self._lock:
                    checksums = dict(self._written[generation, lane])
                self.generations.objects.sync()
                self.generations.complete(generation, lane, checksums)

    def discard_before(self, generation: int) -> None:
        with self._lock:
            self._passed = generation
            busy = set(self._busy)  # the next call deletes what is being written now; `finish` needs its checksums
            for key in [k for k in self._written if k[0] < generation and k[0] not in busy]:
                del self._written[key]
            keep = self.retained | busy
        for old in self.generations.existing():
            if old < generation and old not in keep:
                self.generations.delete(old, self.lanes)
                self.generations.delete_if_empty(old)

    @property
    def retries(self) -> int:
        return self.generations.objects.retries


REMOTE_THREADS = 8
"""Concurrent requests each way to object storage until a run has measured how many it needs."""
LEASE_PATIENCE = 90.0
"""Seconds: longer than the lease that our own killed run left behind."""


class ZarrStore(HostStore):
    """Stores the generations at `url`; with `default` that is `<run>/state`, which moves with the run.

    `owner` describes the run that may write there, `run_id` is the run's id, and `guard` is the run's guard, the only
    one of a default store. For any other URL, the first rank holds a lease, which the other ranks watch. Another run
    that uses the same URL, concurrently or later, is refused.
    """

    def __init__(
        self,
        layout: StateLayout,
        url: str | Path,
        *,
        default: bool,
        owner: str = "",
        run_id: str = "",
        guard: Guard | None = None,
        compression: Compression = "none",
        limits: Limits = Limits(),
    ):
        objects = open_object_store(url)
        self._lease = None if default else Lease(open_object_store(url), owner)
        self.lease_patience = LEASE_PATIENCE
        """Seconds that a start waits for another owner's lease."""
        self._url = None if default else objects.uri("")
        self._location = objects.uri("")
        stored = Generations(objects, layout.order, layout.shape, layout.encoding, compression=compression)
        self._table = GenerationTable(stored, layout.lanes, "" if default else run_id)
        super().__init__(layout, self._table, limits)
        self.guard = objects.guard = guard or Guard()

    @classmethod
    def create(cls, context: StoreContext) -> Self:
        config = context.config
        url = config.url or context.location
        return cls(
            context.layout,
            url,
            default=config.url is None,
            owner=context.owner,
            run_id=context.run_id,
            guard=context.guard,
            compression=config.compression,
            limits=Limits.of(config, 2 if local_path(url) else REMOTE_THREADS),
        )

    def hold(self, ranks: Ranks) -> None:
        if self._lease is None:
            return
        lease = self._lease
        ranks.run_on_rank_zero(lambda: lease.acquire(patience=self.lease_patience), (StoreError,))
        ranks.run_on_all(lambda: follow(lease, ranks), (StoreError,))
        self._guard_by(lease)

    def _guard_by(self, lease: Lease) -> None:
        self.guard = self._table.generations.objects.guard = Guards(self.guard, lease)

    @classmethod
    def resident_bytes(cls, layout: StateLayout) -> int:
        order = layout.order
        window = min(order.chunks_per_window * order.chunk_size, order.longest_lane) * layout.row_bytes
        return 3 * len(layout.lanes) * window

    @classmethod
    def shared_location(cls, config: StoreConfig) -> str | None:
        return config.url

    def describe(self) -> str:
        return f"{self._location}, read and written in the background"

    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        # Before the table is opened, which deletes generations. A store that is used without ranks holds the lease.
        if self._lease is not None and not self._lease.id and not self.lanes.start:
            self._lease.acquire(patience=self.lease_patience)
            self._guard_by(self._lease)
        self._table.generations.repair = self.repair
        super().start(epoch, step, source)

    def close(self) -> None:
        self._table.generations.objects.close()  # ends the pauses of requests that are being retried
        try:
            super().close()
        finally:
            if self._lease is not None:
                self._lease.release()

    def snapshot(self, directory: Path) -> None:
        in_flight = self.in_flight()
        self._table.generations.objects.sync()
        written, base = self._table.written(self.epoch + 1), self._table.base(self.epoch)
        write_reference(self, directory, self._url, base, written, in_flight)

    def retain(self, generations: set[int]) -> None:
        self._table.retained = set(generations)
        if self._threads:
            self._submit(self._cleaner, partial(self._table.discard_before, self.epoch))
