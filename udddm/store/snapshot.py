"""The x0-state of a checkpoint, stored by lane, so that a different number of ranks can load it.

There are three forms. `full`: all rows, as a store of one generation inside the checkpoint; written by stores in
memory. `reference`: a reference to the generations of a zarr store, the checksums of the chunks of the next generation
that were written by then, and the rows of the windows in flight. `none`: the position only, of a run that keeps no
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from udddm.errors import CheckpointError, StoreError
from udddm.files import load_json, make_directory, write_array, write_json
from udddm.log import log
from udddm.order import Order
from udddm.storage import open_object_store
from udddm.storage.local import LocalObjectStore
from udddm.store.encoding import Encoding, Rows, StateDtype
from udddm.store.generations import Checksums, Generations, order_of

if TYPE_CHECKING:
    from udddm.store.base import X0Store
    from udddm.store.repair import Repair


def _header(store: X0Store, form: str, url: str | None) -> dict[str, Any]:
    return {
        "form": form,
        "url": url,
        "epoch": store.epoch,
        "step": store.step,
        "dtype": store.encoding.name,
        "shape": list(store.shape),
        "order": store.order.fingerprint(),
    }


def write_full(store: X0Store, directory: Path) -> None:
    """Write all rows of the store's lanes into `directory`."""
    make_directory(directory)
    target = Generations(LocalObjectStore(directory / "rows"), store.order, store.shape, store.encoding)
    target.create()
    target.begin(store.epoch)
    for lane in store.lanes:
        chunks = range(store.order.num_chunks(lane))
        target.complete(store.epoch, lane, {c: target.write(store.epoch, lane, c, store.rows(lane, c)) for c in chunks})
    target.objects.sync()
    write_json(directory / "snapshot.json", _header(store, "full", None))


def write_none(store: X0Store, directory: Path) -> None:
    """Write the position of a store that keeps no state into `directory`."""
    make_directory(directory)
    write_json(directory / "snapshot.json", _header(store, "none", None))


def write_reference(
    store: X0Store,
    directory: Path,
    url: str | None,
    base: Mapping[int, int],
    written: Mapping[int, Checksums],
    in_flight: Mapping[tuple[int, int], Rows],
) -> None:
    """Write a reference to a zarr store at `url`; None means `<run>/state`.

    `base` (`Generations.record_checksum` of the generation that is read) and `written` are keyed by lane, the visited
    rows `in_flight` by (lane, window).
    """
    make_directory(directory)
    for (lane, window), rows in in_flight.items():
        write_array(directory / f"lane-{lane:04d}-window-{window:06d}.npy", rows)
    for lane in store.lanes:
        windows = sorted(w for own, w in in_flight if own == lane)
        record = {
            "base": base.get(lane),
            "written": {str(c): v for c, v in sorted(written.get(lane, {}).items())},
            "in_flight": windows,
        }
        write_json(directory / f"lane-{lane:04d}.json", record)
    write_json(directory / "snapshot.json", _header(store, "reference", url))


def _mapping(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file that holds a mapping with these keys. Raises StoreError."""
    try:
        return dict(load_json(path, *keys))
    except CheckpointError as error:
        raise StoreError(str(error)) from error


def read_header(directory: Path) -> dict[str, Any]:
    """The content of `snapshot.json`, with all types checked. Raises StoreError, which names the wrong keys."""
    path = directory / "snapshot.json"
    found = _mapping(path, "form", "url", "epoch", "step", "dtype", "shape", "order")
    right = {
        "form": found["form"] in ("full", "reference", "none"),
        "url": found["url"] is None or isinstance(found["url"], str),
        "dtype": found["dtype"] in get_args(StateDtype),
        "shape": isinstance(found["shape"], list)
        and found["shape"] != []
        and all(_count(side) and side for side in found["shape"]),
        "order": isinstance(found["order"], dict),
        "epoch": _count(found["epoch"]),
        "step": _count(found["step"]),
    }
    if wrong := [f"{key} is {found[key]!r}" for key, good in right.items() if not good]:
        raise StoreError(f"cannot read {path}: {'; '.join(wrong)}")
    return found


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


class Snapshot:
    """A checkpoint's x0-state: a `StateSource` at (epoch, step). The files were verified with the checkpoint."""

    def __init__(self, directory: Path, default_url: str | Path, repair: Repair | None = None):
        """`default_url` is the target of a reference without a URL: `<run>/state`.

        `repair` is called for every corrupt chunk, for which `rows` then returns generation 0. Without it, a corrupt
        chunk raises CorruptChunkError.
        """
        header = read_header(directory)
        self.directory, self.shape = directory, tuple(header["shape"])
        self.order = order_of(header["order"], str(directory / "snapshot.json"))
        self.form: str = header["form"]
        self.url: str | None = header["url"]
        self.epoch, self.step = header["epoch"], header["step"]
        self.encoding = Encoding(header["dtype"])
        root = (
            LocalObjectStore(directory / "rows") if self.form == "full" else open_object_store(self.url or default_url)
        )
        self.location = root.uri("")
        """URL of the generations that a `reference` refers to."""
        self.generations = Generations(root, self.order, self.shape, self.encoding, repair)

    def _lane(self, lane: int) -> dict[str, Any]:
        path = self.directory / f"lane-{lane:04d}.json"
        record = _mapping(path, "base", "written", "in_flight")
        if not isinstance(record["written"], dict):
            raise StoreError(f"cannot read {path}: `written` is not a mapping of chunks")
        if not isinstance(record["in_flight"], list) or not all(_count(window) for window in record["in_flight"]):
            raise StoreError(f"cannot read {path}: `in_flight` is not a list of windows")
        return record

    def written(self, lane: int) -> Checksums:
        """The checksums of the chunks of generation epoch + 1 that were written by then."""
        return {int(c): int(v) for c, v in self._lane(lane)["written"].items()}

    def referred(self, lane: int) -> list[tuple[int, int]]:
        """The (generation, chunk) of the chunks from which the state of a lane is read."""
        written = self.written(lane)
        base = range(self.order.num_chunks(lane)) if self.epoch else ()
        return [
            *((self.epoch + 1, chunk) for chunk in written),
            *((self.epoch, chunk) for chunk in base if chunk not in written),
        ]

    def missing(self, stored: Generations, lane: int) -> list[tuple[int, int]]:
        """Those of `referred` that a store does not have. Their contents are checked when they are read."""
        referred = self.referred(lane)
        present = {generation: stored.present(generation, lane) for generation in {each[0] for each in referred}}
        return [each for each in referred if each[1] not in present[each[0]]]

    def base(self, lane: int, *, restore: bool = False) -> Checksums:
        """The checksums of the chunks of generation epoch > 0 that this refers to.

        With `restore`, a damaged or missing record is rebuilt if the chunks are those that this refers to. Raises
        StoreError if the chunks are different ones. That happens when a run that keeps older checkpoints moves its
        state back to a store that it used before.
        """
        expected = self._lane(lane)["base"]
        try:
            found = self.generations.record_checksum(self.epoch, lane)
        except StoreError:
            if not (restore and self.generations.restore_record(self.epoch, lane, expected)):
                raise
            found = expected
        if found != expected:
            raise StoreError(
                f"x0-state generation {self.epoch}, lane {lane} in {self.location} is not the one that the checkpoint "
                f"{self.directory.parent} refers to; resume from a newer checkpoint or start a new run directory"
            )
        return self.generations.record(self.epoch, lane)

    def follow(self, stored: Generations, run_id: str, lanes: range) -> None:
        """Refer to `stored` from now on if it holds the same generations under another name: the store was moved or
        copied together with the run, or is known by an alias.

        `run_id` is the id of the run, which owns the store. Raises StoreError for other failures than missing objects.
        """
        if self.form != "reference" or self.location == stored.objects.uri("") or not run_id:
            return
        here = Generations(stored.objects, self.order, self.shape, self.encoding, self.generations.repair)
        if stored.identity() == here.identity() and stored.owner() == run_id and self._all_in(here, lanes):
            log.info(f"the x0-state of {self.location} is now at {stored.objects.uri('')}")
            self.generations, self.location = here, stored.objects.uri("")

    def _all_in(self, here: Generations, lanes: range) -> bool:
        """Whether a store has the generation that this refers to, and the chunks of the next one."""
        try:
            for lane in lanes:
                if self.epoch and here.record_checksum(self.epoch, lane) != self._lane(lane)["base"]:
                    return False
                for chunk, checksum in self.written(lane).items():
                    here.read(self.epoch + 1, lane, chunk, checksum)
                if self.missing(here, lane):
                    return False
        except StoreError:
            return False
        return True

    def windows_in_flight(self, lane: int) -> list[int]:
        """The windows of a lane that were being visited."""
        return list(self._lane(lane)["in_flight"])

    def in_flight(self, lane: int, window: int) -> Rows:
        """The visited rows of a window, in the order of their visits. Raises StoreError."""
        path = self.directory / f"lane-{lane:04d}-window-{window:06d}.npy"
        try:
            rows: Rows = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise StoreError(f"cannot read {path}: {error}") from error
        visited = len(visited_rows(self.order, lane, self.epoch, window, self.step))
        if rows.shape != (visited, *self.shape) or rows.dtype != self.encoding.array:
            kind = f"{rows.dtype} {list(rows.shape)}"
            raise StoreError(f"{path} holds {kind}, not {self.encoding.array} {[visited, *self.shape]}")
        return rows

    def rows(self, lane: int, chunk: int) -> Rows:
        stored = self.generations
        if self.form == "none":
            return stored.zero(lane, chunk)
        if self.form == "full":
            return stored.state(self.epoch, lane, chunk, stored.record(self.epoch, lane)[chunk])
        written = self.written(lane)
        if chunk in written:
            return stored.state(self.epoch + 1, lane, chunk, written[chunk])
        if self.epoch == 0:
            rows = stored.zero(lane, chunk)
        else:
            rows = stored.state(self.epoch, lane, chunk, self.base(lane)[chunk]).copy()
        window = self.order.window_of(lane, self.epoch, chunk)
        visited = visited_rows(self.order, lane, self.epoch, window, self.step)
        if len(visited):
            first = self.order.row_offset(lane, self.epoch, chunk)
            inside = (visited >= first) & (visited < first + len(rows))
            rows[visited[inside] - first] = self.in_flight(lane, window)[inside]
        return rows


def visited_rows(order: Order, lane: int, epoch: int, window: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The rows of a window's buffer that steps before `step` have visited, in the order of the visits."""
    low, high = order.window_span(lane, epoch, window)
    return order.window_rows(lane, epoch, window)[: max(0, min(step * order.samples_per_lane_step, high) - low)]
