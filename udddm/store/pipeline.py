"""Prefetch and write-behind: threads read the x0-state of the coming steps and write that of past steps.

A lane's windows go through three phases: being read, in use, being written. Three are in memory, and more only if
reading or writing one takes longer than using one (`Autotune`, which also chooses threads and depths). A window's rows
stay in one buffer throughout: a row is copied out when its step is prefetched, and overwritten when the step's result
arrives. Reads and writes of an epoch never conflict in the table, which is read at generation g and written at g + 1.

    reader threads    table.load  -> window buffer
    gatherer          window buffer -> batches, some steps ahead -> read()
    scatterer         write() -> window buffer; a finished window is passed to the writers
    writer threads    window buffer -> table.save; after a lane's last chunk, table.finish

The next epoch's windows are prefetched while those of the current epoch are in use and being written. A chunk of the
next generation is passed on in memory as soon as its window is visited, whether or not it is written yet: a state has
to be durable for a checkpoint, not for the next epoch of the same process. So no reader ever waits for a writer, and
the latency of a write never delays the next epoch.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from udddm.errors import StoreError
from udddm.order import Batch
from udddm.storage.guard import Guard
from udddm.storage.threads import start_thread
from udddm.store.autotune import Autotune, Limits
from udddm.store.base import StateSource, X0Store
from udddm.store.encoding import Rows
from udddm.store.idle import idle_of
from udddm.store.layout import StateLayout
from udddm.store.pool import Pool
from udddm.store.snapshot import visited_rows

T = TypeVar("T")

_POLL = 0.1  # seconds between checks for a background failure while waiting


class ChunkTable(ABC):
    """Holds the chunks between their visits. Called from several threads, but never concurrently for one chunk."""

    @abstractmethod
    def open(self, epoch: int, step: int, source: StateSource | None) -> None:
        """Load the state of a position: all of generation `epoch`, and of the next the rows visited before `step`."""

    @abstractmethod
    def load(self, generation: int, lane: int, chunk: int) -> Rows:
        """The rows of a chunk, [n, C, H, W] encoded."""

    @abstractmethod
    def save(self, generation: int, lane: int, chunk: int, rows: Rows) -> None:
        """Store rows durably as a chunk of a generation. `rows` is only valid during the call."""

    def finish(self, generation: int, lane: int) -> None:
        """Called when all chunks of a lane are saved."""
        return

    def discard_before(self, generation: int) -> None:
        """Called when this run will no longer read the generations before this one."""
        return

    @property
    def retries(self) -> int:
        return 0


@dataclass
class _Window:
    epoch: int
    lane: int
    chunks: list[tuple[int, int, int]]
    """(chunk, first row, last row + 1) in the buffer."""
    buffer: Rows
    unread: int
    """Chunks still to be read."""
    unvisited: int
    """Rows whose successors have not arrived yet."""
    unsaved: int
    """Chunks still to be written."""


class HostStore(X0Store):
    """The pipeline over a `ChunkTable`: the `pinned` and `zarr` stores."""

    def __init__(self, layout: StateLayout, table: ChunkTable, limits: Limits = Limits()):
        """Raises StoreError if `limits` allow too little memory."""
        super().__init__(layout)
        device = self.device
        self.table = table
        self.guard = Guard()
        """Checks in every step that this run may still write."""
        self.pace = Autotune(layout.order, layout.lanes, layout.row_bytes, limits)
        self._changed = threading.Condition()
        self._windows: dict[tuple[int, int, int], _Window] = {}
        self._held: Counter[int] = Counter()  # windows of each lane
        self._first = 0  # the generation that was complete at the start
        self._saved: set[tuple[int, int, int]] = set()  # (generation, lane, chunk) written since then
        self._visited: dict[tuple[int, int, int], tuple[_Window, int, int]] = {}  # the same keys, being written
        self._unsaved: dict[tuple[int, int], int] = {}  # missing chunks per (generation, lane)
        self._awaiting: dict[tuple[int, int, int], tuple[_Window, int]] = {}
        self._failure: BaseException | None = None
        self._stopping = False
        self._in_progress = 0  # scatters and saves that are requested but not finished
        self._ready: queue.Queue[tuple[int, int, torch.Tensor, torch.cuda.Event | None]] = queue.Queue(self.pace.depth)
        self._results: queue.Queue[tuple[int, int, torch.Tensor, torch.cuda.Event | None] | None] = queue.Queue(
            self.pace.depth
        )
        self._readers = Pool("x0-state-read", self.pace.readers)
        self._writers = Pool("x0-state-write", self.pace.writers)
        self._cleaner = Pool("x0-state-clean", 1)  # so that deletions never delay a write
        self._threads: list[threading.Thread] = []
        self._idle = idle_of(device)
        self._last_read: tuple[float, float] | None = None  # time at which `read` returned, and the write wait so far
        # One stream per direction: on a shared one, copies of coming batches would wait for the current step's results.
        self._reading = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._writing = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    # Called by the training step.

    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        self.epoch, self.step, self._first = epoch, step, epoch
        self.table.open(epoch, step, source)
        for lane in self.lanes:
            self._resume_lane(lane, source)
        for name, body in (("x0-state-gather", self._gather), ("x0-state-scatter", self._scatter)):
            guarded = partial(self._guarded, partial(self._on_device, body))
            self._threads.append(start_thread(guarded, name))

    def read(self) -> torch.Tensor:
        began, counters, queued = time.perf_counter(), self.counters, self._ready.qsize()
        if self._last_read is not None:
            since, waited = self._last_read
            self.pace.step.add(began - since - (counters.write_wait - waited))
        if not queued:
            self._idle.begin()
        epoch, step, stored, copied = self._waiting(lambda: self._ready.get(timeout=_POLL))
        now = time.perf_counter()
        self._last_read = now, counters.write_wait
        counters.queued += queued
        counters.reads += 1
        if not queued:
            self._idle.end()
            counters.read_wait += now - began
        counters.idle = self._idle.seconds
        assert (epoch, step) == (self.epoch, self.step), "read and write must alternate"
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            stored.record_stream(current)
        return self.encoding.decode(stored)

    def put(self, values: torch.Tensor) -> None:
        encoded = self.encoding.encode(values.detach())
        if encoded.data_ptr() == values.data_ptr():  # float32: the caller may modify its tensor before it is written
            encoded = encoded.clone()
        copied = None
        if self._writing is not None:
            self._writing.wait_stream(torch.cuda.current_stream(self.device))
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # else waiting for it occupies a core
            with torch.cuda.stream(self._writing):
                host = torch.empty(encoded.shape, dtype=encoded.dtype, pin_memory=True)
                host.copy_(encoded, non_blocking=True)
                copied.record(self._writing)
            encoded.record_stream(self._writing)
            encoded = host
        with self._changed:
            self._in_progress += 1
        began = time.perf_counter() if self._results.full() else None
        if began is not None:
            self._idle.begin()
        item = (self.epoch, self.step, encoded, copied)
        self._waiting(lambda: self._results.put(item, timeout=_POLL))
        if began is not None:
            self._idle.end()
            self.counters.write_wait += time.perf_counter() - began
        self.counters.retries = self.table.retries

    def next_epoch(self) -> None:
        with self._changed:
            self._saved = {key for key in self._saved if key[0] >= self.epoch}
            self._unsaved = {key: count for key, count in self._unsaved.items() if key[0] >= self.epoch}
        self._submit(self._cleaner, partial(self.table.discard_before, self.epoch))

    def settle(self) -> None:
        """Wait until every visited row is in its buffer and every finished window is durable. Raises StoreError."""
        with self._changed:
            while self._in_progress:
                self._check()
                self._changed.wait(_POLL)
        self._check()
        self.counters.retries = self.table.retries

    def rows(self, lane: int, chunk: int) -> Rows:
        self.settle()
        index = self.order.window_of(lane, self.epoch, chunk)
        if (self.epoch + 1, lane, chunk) in self._saved:
            return self.table.load(self.epoch + 1, lane, chunk)
        if len(visited_rows(self.order, lane, self.epoch, index, self.step)):
            window = self._windows[self.epoch, lane, index]
            first = self.order.row_offset(lane, self.epoch, chunk)
            return window.buffer[first : first + self.order.chunk_slots(lane, chunk)].copy()
        return self.table.load(self.epoch, lane, chunk)

    def in_flight(self) -> dict[tuple[int, int], Rows]:
        """The visited rows of each unfinished (lane, window), in the order of their visits."""
        self.settle()
        found = {}
        with self._changed:
            windows = list(self._windows.items())
        for (epoch, lane, index), window in windows:
            if epoch == self.epoch:
                visited = visited_rows(self.order, lane, epoch, index, self.step)
                if len(visited):
                    found[lane, index] = window.buffer[visited]
        return found

    @property
    def backlog(self) -> int:
        """Number of chunks whose successors have all arrived but are not durable yet."""
        return len(self._visited)

    def gauges(self) -> dict[str, float]:
        pace = self.pace
        return {
            "readers": pace.readers,
            "writers": pace.writers,
            "windows": pace.windows,
            "depth": pace.depth,
            "backlog_chunks": self.backlog,
        }

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        with suppress(queue.Full):
            self._results.put_nowait(None)
        with suppress(queue.Empty):  # makes room for the gatherer, so that it need not time out
            self._ready.get_nowait()
        for thread in self._threads:
            thread.join()
        for pool in (self._readers, self._writers, self._cleaner):
            pool.shutdown()

    def _check(self) -> None:
        self.guard.check()
        if self._failure is not None:
            if isinstance(self._failure, StoreError):
                raise self._failure
            raise StoreError(f"the x0-state pipeline failed: {self._failure!r}") from self._failure
        if self._stopping:
            raise StoreError("the x0-state store is closed")

    def _waiting(self, attempt: Callable[[], T]) -> T:
        """Repeat a queue operation that times out until it succeeds or the background has failed."""
        while True:
            self._check()
            try:
                return attempt()
            except (queue.Empty, queue.Full):
                continue

    # Run by background threads.

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _on_device(self, body: Callable[[], None]) -> None:
        """Make the store's GPU the current one of this thread. A new thread starts with the first GPU, where leaving a
        stream or waiting for an event would create a CUDA context in every rank."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        body()

    def _submit(self, pool: Pool, task: Callable[[], None]) -> None:
        """Run a task in a pool and count it as in progress. A failure is raised in the next step."""

        def counted() -> None:
            try:
                self._guarded(task)
            finally:
                with self._changed:
                    self._in_progress -= 1
                    self._changed.notify_all()

        with self._changed:
            if self._stopping:
                return
            self._in_progress += 1
        pool.submit(counted)

    def _gather(self) -> None:
        epoch, step = self.epoch, self.step
        while not self._stopping:
            batch = self.order.batch_of(self.lanes, epoch, step)
            stored = torch.zeros(
                len(batch.ids), *self.shape, dtype=self.encoding.tensor, pin_memory=self._reading is not None
            )
            self._copy_out(batch, epoch, self.encoding.to_array(stored))
            copied = None
            if self._reading is not None:
                with torch.cuda.stream(self._reading):
                    stored = stored.to(self.device, non_blocking=True)
                    copied = self._reading.record_event()
            while not self._stopping:
                try:
                    self._ready.put((epoch, step, stored, copied), timeout=_POLL)
                    break
                except queue.Full:
                    continue
            self._read_ahead(epoch, batch)
            epoch, step = (epoch, step + 1) if step + 1 < self.order.steps_per_epoch else (epoch + 1, 0)

    def _scatter(self) -> None:
        while not self._stopping:
            try:
                item = self._results.get(timeout=_POLL)
            except queue.Empty:
                continue
            if item is None:
                return
            epoch, step, stored, copied = item
            if copied is not None:
                copied.synchronize()
            self._copy_in(self.order.batch_of(self.lanes, epoch, step), epoch, self.encoding.to_array(stored))
            with self._changed:
                self._in_progress -= 1
                self._changed.notify_all()

    # Separate functions, because a thread's local variable would keep its last window in memory.

    def _copy_out(self, batch: Batch, epoch: int, rows: Rows) -> None:
        for place, window, taken in self._parts(batch, epoch, wait=True):
            np.take(window.buffer, taken, axis=0, out=rows[place], mode="clip")

    def _copy_in(self, batch: Batch, epoch: int, rows: Rows) -> None:
        for place, window, taken in self._parts(batch, epoch, wait=False):
            window.buffer[taken] = rows[place]
            window.unvisited -= len(taken)
            if not window.unvisited:
                self._hand_over(window)
                for part in window.chunks:
                    self._submit(self._writers, partial(self._save, window, *part))

    def _hand_over(self, window: _Window) -> None:
        """Give a visited window's rows to the next epoch's windows that wait for them, and to those yet to begin."""
        with self._changed:
            for chunk, first, past in window.chunks:
                key = (window.epoch + 1, window.lane, chunk)
                self._visited[key] = (window, first, past)
                if waiting := self._awaiting.pop(key, None):
                    reader, place = waiting
                    reader.buffer[place : place + past - first] = window.buffer[first:past]
                    reader.unread -= 1
            self._changed.notify_all()

    def _parts(self, batch: Batch, epoch: int, wait: bool) -> Iterator[tuple[slice, _Window, np.ndarray]]:
        """(places in the batch, window, rows of its buffer) of each part of a step."""
        for part in batch.parts:
            first = (part.lane - self.lanes.start) * self.order.samples_per_lane_step + part.first
            key = (epoch, part.lane, part.window)
            if wait:
                self._ensure(key, batch, epoch)
            yield slice(first, first + len(part.rows)), self._windows[key], part.rows

    def _ensure(self, key: tuple[int, int, int], batch: Batch, epoch: int) -> None:
        """Wait until a window is there and read; meanwhile begin the step's others, so that no lane waits its turn."""
        with self._changed:
            while key not in self._windows or self._windows[key].unread:
                begun = [
                    self._begin(other)
                    for part in batch.parts
                    if (other := (epoch, part.lane, part.window)) not in self._windows
                ]
                if not any(begun):
                    self._pause()

    def _pause(self) -> None:
        if self._stopping or self._failure is not None:
            raise StoreError("the x0-state store is closed")
        self._changed.wait(_POLL)

    def _read_ahead(self, epoch: int, batch: Batch) -> None:
        """Start reading the windows after those of a step, in the order of use, as far as there is room."""
        self._adapt()
        used = {part.lane: part.window for part in batch.parts}
        with self._changed:
            for lane in self.lanes:
                windows = self.order.num_windows(lane)
                following = used.get(lane, windows - 1) + 1
                for index in range(following, min(following + self.pace.ahead, 2 * windows)):
                    key = (epoch + index // windows, lane, index % windows)
                    if key not in self._windows and not self._begin(key):
                        break

    def _adapt(self) -> None:
        """Adapt the number of threads and the queue lengths to the measurements."""
        pace = self.pace
        pace.update()
        self._readers.limit, self._writers.limit = pace.readers, pace.writers
        for each in (self._ready, self._results):
            if each.maxsize != pace.depth:
                with each.mutex:
                    each.maxsize = pace.depth
                    each.not_full.notify_all()

    def _begin(self, key: tuple[int, int, int]) -> bool:
        """Start reading a window if its lane has room for it. Called with the lock held."""
        epoch, lane, index = key
        if self._held[lane] >= self.pace.windows:
            return False
        window = self._windows[key] = self._new_window(epoch, lane, index)
        for chunk, first, past in window.chunks:
            if epoch == self._first or (epoch, lane, chunk) in self._saved:
                self._readers.submit(self._guarded, partial(self._load, window, chunk, first, past))
            elif source := self._visited.get((epoch, lane, chunk)):
                other, start, stop = source
                window.buffer[first:past] = other.buffer[start:stop]
                window.unread -= 1
            else:
                self._awaiting[epoch, lane, chunk] = (window, first)
        return True

    def _new_window(self, epoch: int, lane: int, index: int) -> _Window:
        chunks, first = [], 0
        for chunk in self.order.window_chunks_of(lane, epoch, index):
            past = first + self.order.chunk_slots(lane, chunk)
            chunks.append((chunk, first, past))
            first = past
        buffer = np.empty((first, *self.shape), self.encoding.array)
        self._held[lane] += 1
        return _Window(epoch, lane, chunks, buffer, len(chunks), first, len(chunks))

    def _load(self, window: _Window, chunk: int, first: int, past: int) -> None:
        began = time.perf_counter()
        window.buffer[first:past] = self.table.load(window.epoch, window.lane, chunk)
        with self._changed:
            if window.epoch:  # generation 0 is computed
                self.pace.load.add(time.perf_counter() - began)
            self.counters.bytes_read += window.buffer[first:past].nbytes
            window.unread -= 1
            self._changed.notify_all()

    def _save(self, window: _Window, chunk: int, first: int, past: int) -> None:
        rows = window.buffer[first:past]
        generation, lane = window.epoch + 1, window.lane
        with self._changed:  # a chunk's generations are saved in order; the older is ahead in the same queue
            while (generation - 1, lane, chunk) in self._visited:
                self._pause()
        began = time.perf_counter()
        self.table.save(generation, lane, chunk, rows)
        with self._changed:
            self.pace.save.add(time.perf_counter() - began)
            self.counters.bytes_written += rows.nbytes
            self._saved.add((generation, lane, chunk))
            del self._visited[generation, lane, chunk]
            window.unsaved -= 1
            if not window.unsaved:
                index = self.order.window_of(lane, window.epoch, chunk)
                del self._windows[window.epoch, lane, index]
                self._held[lane] -= 1
            left = self._unsaved.get((generation, lane), self.order.num_chunks(lane)) - 1
            self._unsaved[generation, lane] = left
            self._changed.notify_all()
        if not left:
            self.table.finish(generation, lane)

    def _resume_lane(self, lane: int, source: StateSource | None) -> None:
        """Rebuild the windows that were in flight at the start position, and register the chunks already written."""
        epoch, order = self.epoch, self.order
        unsaved = order.num_chunks(lane)
        for index in range(order.num_windows(lane)):
            low, high = order.window_span(lane, epoch, index)
            visited = min(self.step * order.samples_per_lane_step, high) - low
            if visited >= high - low:
                chunks = order.window_chunks_of(lane, epoch, index)
                self._saved.update((epoch + 1, lane, chunk) for chunk in chunks)
                unsaved -= len(chunks)
            elif visited > 0:
                assert source is not None
                window = self._windows[epoch, lane, index] = self._new_window(epoch, lane, index)
                for chunk, first, past in window.chunks:
                    window.buffer[first:past] = self.encoding.recode(source.rows(lane, chunk), source.encoding)
                window.unread = 0
                window.unvisited -= visited
        self._unsaved[epoch + 1, lane] = unsaved
        if not unsaved:
            self.table.finish(epoch + 1, lane)
