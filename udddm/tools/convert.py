"""Copy a state to another location or dtype, and delete unreferenced generations: `udddm-store convert` and `gc`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from udddm.errors import StoreError
from udddm.files import load_json
from udddm.order import Order
from udddm.runs.remote import open_copy
from udddm.runs.run import Run, run_id
from udddm.storage import open_object_store
from udddm.storage.lease import Lease
from udddm.store.encoding import Encoding, Rows, StateDtype
from udddm.store.generations import Generations, generation_name
from udddm.store.snapshot import Snapshot
from udddm.tools.inspect import Place, find, of_run


def convert(place: Place, destination: str, dtype: StateDtype | None) -> str:
    """Write the newest state of a run or store as one complete generation at `destination`, a path or URL.

    The newest state of a run is that of its newest checkpoint (within an epoch: the current rows). Returns a line that
    describes the copy. Raises StoreError if there is nothing to copy, or if the destination holds another state or is
    being written.
    """
    generation, order, shape, encoding, rows = _newest(place)
    target_encoding = Encoding(dtype or encoding.name)
    target = Generations(open_object_store(destination), order, shape, target_encoding)
    if place.generations is not None and target.objects.uri("") == place.generations.objects.uri(""):
        raise StoreError(f"{destination} is the store itself; choose another destination")
    target.check_free()
    lease = Lease(open_object_store(destination), "udddm-store convert")
    lease.acquire()
    target.objects.guard = lease
    try:
        return _copy(place, target, generation, rows, encoding)
    finally:
        lease.release()


def _copy(
    place: Place, target: Generations, generation: int, rows: Callable[[int, int], Rows], encoding: Encoding
) -> str:
    order, destination = target.order, target.objects.uri("")
    target.create()
    if target.is_complete(generation):
        raise StoreError(f"{destination} already holds {generation_name(generation)}; choose another destination")
    target.begin(generation)
    for lane in range(order.num_lanes):
        checksums = {}
        for chunk in range(order.num_chunks(lane)):
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
        if snapshot.form == "none":
            raise StoreError(f"{place.name} keeps no x0-state, because its objective does not read it")
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


def collect(path: str, report: Callable[[str], None]) -> list[int]:
    """Delete the generations that no checkpoint of a stopped run refers to, and return their numbers.

    `report` is called with a line and the reason for each, before anything is deleted. Generations newer than the
    newest checkpoint are kept: a resumed run rewrites them, and another copy of the run directory may refer to them.
    Raises StoreError and deletes nothing for a bare store, a store of another run, or if a checkpoint is damaged or all
    are missing; ConfigError or StoreError if the run is alive.
    """
    run = open_copy(path)
    if not (run.path / "run.json").exists():
        find(path)  # raises if it is not a store either
        raise StoreError(
            f"{path} is a store without its run: only a run's checkpoints say which generations are needed; "
            "give the run directory"
        )
    with ExitStack() as held:
        # Without patience: a list of checkpoints from before a wait would lack those that were written during it.
        held.enter_context(run.lock(patience=0.0))
        if not run.exclusive:
            raise StoreError(
                f"the file system of {path} has no locks, so that a live run cannot be detected: nothing was "
                "deleted. Delete generations by hand"
            )
        run.download()
        place = of_run(path, run)
        if place.generations is None:
            return []
        stored = place.generations
        default = stored.objects.uri("") == open_object_store(run.state).uri("")
        check = _hold_store(run, stored, held) if not default else run.guard.check
        unneeded = _unneeded(place, stored, report)
        for generation in unneeded:
            check()
            stored.delete(generation, range(stored.order.num_lanes))
    return unneeded


def _hold_store(run: Run, stored: Generations, held: ExitStack) -> Callable[[], None]:
    """Lock a store that another run directory may also use. Returns a check that the lock is still held."""
    owner, own = stored.owner(), run_id(run.path)
    where = stored.objects.uri("")
    if owner != own:
        raise StoreError(
            f"{where} is the store of another run ({owner or 'id not recorded'}), not of {run} ({own or 'no id'}): "
            "nothing was deleted. Run gc on the run that owns the store"
        )
    lease = Lease(open_object_store(where), run.identity)
    lease.acquire()
    held.callback(lease.release)
    return lease.check


def _unneeded(place: Place, stored: Generations, report: Callable[[str], None]) -> list[int]:
    """The generations to delete; reports the reasons. Raises StoreError if that cannot be determined."""
    assert place.run is not None
    existing, kept = stored.existing(), place.run.checkpoints()
    if not place.checkpoints and existing:
        raise StoreError(
            f"{kept.name(kept.directory)} holds no checkpoint, but {stored.objects.uri('')} holds generations: "
            "nothing was deleted. Restore the checkpoints (is their disk mounted?), or delete the store by hand"
        )
    for path in place.checkpoints:
        if (problem := kept.corruption(path)) is not None:
            raise StoreError(
                f"checkpoint {path.name} is damaged, so the generations that it needs are unknown: {problem}. Nothing "
                "was deleted; restore the checkpoint from a copy, or delete it if it is not needed"
            )
    epochs = {path.name: int(load_json(path / "state" / "snapshot.json")["epoch"]) for path in place.checkpoints}
    needed = {epoch + ahead for epoch in epochs.values() for ahead in (0, 1)}
    newest = max(needed, default=0)
    unneeded = [g for g in existing if g not in needed and g <= newest]
    if unneeded:
        references = ", ".join(f"{name} to {epoch} and {epoch + 1}" for name, epoch in epochs.items())
        report(f"checkpoints refer to generations: {references}")
    for generation in unneeded:
        report(f"deleting {generation_name(generation)} from {stored.objects.uri('')}: no checkpoint refers to it")
    for generation in (g for g in existing if g > newest):
        report(f"keeping {generation_name(generation)}: it is newer than the newest checkpoint")
    return unneeded
