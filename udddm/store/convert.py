"""Copying a state to another place or dtype, and removing generations nobody refers to: `udddm-store convert`, `gc`."""

from __future__ import annotations

from collections.abc import Callable

from udddm.checkpoint import load_json
from udddm.order import Order
from udddm.store.encoding import Encoding, Rows, StateDtype
from udddm.store.errors import StoreError
from udddm.store.generations import Generations, generation_name
from udddm.store.inspect import Place
from udddm.store.lease import Lease
from udddm.store.objects import open_objects
from udddm.store.snapshot import Snapshot


def convert(place: Place, destination: str, dtype: StateDtype | None) -> str:
    """Write the newest state of a run or store as one complete generation at `destination`, a path or URL.

    A run's is that of its newest checkpoint (within an epoch: the rows as they stand). Returns a line about it.
    Raises StoreError when there is nothing to copy, or the destination holds another state or is being written.
    """
    generation, order, shape, encoding, rows = _newest(place)
    target_encoding = Encoding(dtype or encoding.name)
    target = Generations(open_objects(destination), order, shape, target_encoding)
    if place.generations is not None and target.objects.describe("") == place.generations.objects.describe(""):
        raise StoreError(f"{destination} is the store itself; choose another destination")
    lease = Lease(open_objects(destination), "udddm-store convert")
    lease.acquire()
    try:
        return _copy(place, target, generation, rows, encoding)
    finally:
        lease.release()


def _copy(
    place: Place, target: Generations, generation: int, rows: Callable[[int, int], Rows], encoding: Encoding
) -> str:
    order, destination = target.order, target.objects.describe("")
    target.create()
    if target.is_complete(generation):
        raise StoreError(f"{destination} already holds {generation_name(generation)}; choose another destination")
    target.begin(generation)
    for lane in range(order.lanes):
        checksums = {}
        for chunk in range(order.chunks(lane)):
            checksums[chunk] = target.write(
                generation, lane, chunk, target.encoding.recode(rows(lane, chunk), encoding)
            )
        target.objects.sync()
        target.complete(generation, lane, checksums)
    target.objects.sync()
    return (
        f"{generation_name(generation)} of {place.name} ({encoding.name}) is in {destination} ({target.encoding.name})"
    )


def _newest(place: Place) -> tuple[int, Order, tuple[int, ...], Encoding, Callable[[int, int], Rows]]:
    if place.checkpoints:
        assert place.run is not None
        snapshot = Snapshot(place.checkpoints[-1] / "state", place.run.state)
        return snapshot.epoch, snapshot.order, snapshot.shape, snapshot.encoding, snapshot.rows
    if place.generations is not None:
        stored = place.generations
        whole = [g for g in stored.existing() if stored.is_complete(g)]
        if whole:
            newest = whole[-1]

            def rows(lane: int, chunk: int) -> Rows:
                return stored.read(newest, lane, chunk, stored.record(newest, lane)[chunk])

            return newest, stored.order, stored.shape, stored.encoding, rows
    raise StoreError(f"{place.name} holds neither a checkpoint nor a complete generation")


def collect(place: Place) -> list[int]:
    """Remove the generations that no kept checkpoint of a stopped run refers to, and return their numbers.

    Raises StoreError for a bare store, ConfigError when the run is alive.
    """
    if place.run is None:
        raise StoreError(
            f"{place.name} is a store without its run: only a run's checkpoints say which generations are needed; "
            "give the run directory"
        )
    if place.generations is None:
        return []
    stored = place.generations
    with place.run.held():
        needed = set()
        for path in place.checkpoints:
            epoch = int(load_json(path / "state" / "snapshot.json")["epoch"])
            needed |= {epoch, epoch + 1}
        removed = [g for g in stored.existing() if g not in needed]
        for generation in removed:
            stored.delete(generation, range(stored.order.lanes))
    return removed
