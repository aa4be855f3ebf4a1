"""An x0-state store in SQLite, from the standard library: a database file with one row per sample.

    PYTHONPATH=examples udddm-train --config digits --set store.kind=custom_store:SqliteStore

The database is a working copy that is rebuilt at each start. A run resumes from its checkpoint, to which
`X0Store.snapshot` copies all rows, so the database need not survive a crash.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import torch

from udddm.config import Section
from udddm.errors import ConfigError, StoreError
from udddm.storage import local_path
from udddm.store import StateLayout, StoreContext, X0Store
from udddm.store.base import StateSource
from udddm.store.encoding import Rows


class SqliteStore(X0Store):
    """The states of this rank's lanes in an SQLite database."""

    class Settings(Section):
        """The section `store.settings`."""

        directory: str | None = None
        """Directory of the database; unset: `state` in the run directory."""
        cache_mb: int = 16
        """Size of SQLite's page cache in MB."""

    def __init__(self, layout: StateLayout, directory: Path, cache_mb: int = 16):
        super().__init__(layout)
        # Each rank owns its lanes exclusively, so each rank writes to a separate file.
        self.path, self.cache_mb = directory / f"lanes-{layout.lanes.start:04d}.sqlite", cache_mb
        self._database: sqlite3.Connection | None = None

    @classmethod
    def create(cls, context: StoreContext, settings: Settings | None = None) -> Self:
        chosen = settings or cls.Settings()
        directory = local_path(chosen.directory or context.location)
        if directory is None:
            raise ConfigError(
                f"store.settings.directory: SQLite needs a local directory, and {context.location} is a URL"
            )
        return cls(context.layout, directory, chosen.cache_mb)

    @classmethod
    def resident_bytes(cls, layout: StateLayout) -> int:
        return 2 * layout.step_samples * layout.row_bytes  # one batch being read, and one being written

    def describe(self) -> str:
        return f"SQLite, {self.path}"

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The open database. Converts its errors to StoreError."""
        assert self._database is not None, "call start first"
        try:
            yield self._database
        except sqlite3.Error as error:
            raise StoreError(
                f"{self.path}: {error}. Free disk space or restore access, then run the same command"
            ) from error

    def start(self, epoch: int, step: int, source: StateSource | None) -> None:
        self.epoch, self.step = epoch, step
        self.close()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            self._database = sqlite3.connect(self.path, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot create {self.path}: {error}; set another store.settings.directory") from error
        with self._open() as database:
            # The file is not used after a crash, so it needs neither a journal nor synced writes.
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.execute(f"PRAGMA cache_size = -{self.cache_mb * 1000}")
            database.execute("CREATE TABLE state (slot INTEGER PRIMARY KEY, row BLOB NOT NULL)")
            for lane, chunk, rows in self.initial_rows(source):
                place = self.layout.chunk_slots(lane, chunk)
                self._write(range(place.start, place.stop), rows)

    def _write(self, slots: Sequence[int], rows: Rows) -> None:
        with self._open() as database:
            database.execute("BEGIN")
            pairs = ((slot, row.tobytes()) for slot, row in zip(slots, rows, strict=True))
            database.executemany("REPLACE INTO state VALUES (?, ?)", pairs)
            database.execute("COMMIT")
        self.counters.bytes_written += rows.nbytes

    def _array(self, blobs: list[bytes]) -> Rows:
        self.counters.bytes_read += sum(map(len, blobs))
        return np.frombuffer(b"".join(blobs), self.encoding.array).reshape(len(blobs), *self.shape)

    def read(self) -> torch.Tensor:
        slots, places = self.layout.step_slots(self.epoch, self.step)
        with self._open() as database:
            found = [database.execute("SELECT row FROM state WHERE slot = ?", (slot,)) for slot in slots.tolist()]
            rows = self._array([row for cursor in found for (row,) in cursor])
        batch = np.zeros((self.layout.step_samples, *self.shape), self.encoding.array)  # padding stays 0
        batch[places] = rows
        return self.encoding.decode(self.encoding.to_tensor(batch)).to(self.device)

    def put(self, values: torch.Tensor) -> None:
        slots, places = self.layout.step_slots(self.epoch, self.step)
        rows = self.encoding.to_array(self.encoding.encode(values).cpu())
        self._write(slots.tolist(), rows[places])

    def rows(self, lane: int, chunk: int) -> Rows:
        place = self.layout.chunk_slots(lane, chunk)
        query = "SELECT row FROM state WHERE slot >= ? AND slot < ? ORDER BY slot"
        with self._open() as database:
            return self._array([row for (row,) in database.execute(query, (place.start, place.stop))])

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
