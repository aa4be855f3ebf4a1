"""A run that lost its lease changes nothing, neither in a later request nor in one that had already started."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.errors import CheckpointError, StoreError
from udddm.order import Order
from udddm.runs.manifest import MANIFEST
from udddm.runs.remote import WRITER, RemoteCheckpoints
from udddm.storage import ObjectStore, open_object_store
from udddm.storage.guard import Guard
from udddm.storage.lease import KEY, MARGIN, Instant, Lease
from udddm.storage.s3 import PART, REQUEST_TIMEOUT
from udddm.store import Encoding, StateLayout
from udddm.store.zarr import ZarrStore
from udddm.testing.s3 import BUCKET, S3Server

ALONE = Ranks(0, 1, torch.device("cpu"))
CHANGES: dict[str, Callable[[ObjectStore, Path], object]] = {
    "put": lambda objects, file: objects.put("there", b"mine"),
    "upload": lambda objects, file: objects.upload(file, "there"),
    "delete": lambda objects, file: objects.delete("there"),
    "put_if_absent": lambda objects, file: objects.put_if_absent("new", b"mine"),
    "compare_and_swap": lambda objects, file: objects.compare_and_swap("there", b"mine", b"there"),
}


@pytest.fixture
def url(s3: S3Server) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


class Held(Guard):
    """Calls `meanwhile` once after a successful check, to simulate a pause between the check and the request."""

    fences = True

    def __init__(self, meanwhile: Callable[[], None] = lambda: None):
        self.meanwhile = meanwhile
        self.lost = False

    def check(self) -> None:
        if self.lost:
            raise StoreError("lost the lease")

    def wait(self) -> None:
        self.check()
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()


def take_over(url: str, lease: Lease) -> Lease:
    """Let another run take over the lease; `lease` has not noticed yet."""
    lease.objects.delete(KEY)
    other = Lease(open_object_store(url), "the successor")
    other.acquire()
    return other


@pytest.fixture
def leases() -> Iterator[list[Lease]]:
    """Leases that are released at the end of the test."""
    made: list[Lease] = []
    yield made
    for lease in made:
        lease.release()


@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_of_change_checks_the_guard(place: str, name: str, tmp_path: Path) -> None:
    objects = open_object_store(place)
    objects.put("there", b"there")
    (tmp_path / "file").write_bytes(b"mine")
    guard = objects.guard = Held()
    guard.lost = True
    with pytest.raises(StoreError, match="lost the lease"):
        CHANGES[name](objects, tmp_path / "file")
    assert objects.get("there") == b"there" and list(objects.list("")) == ["there"]
    guard.lost = False
    CHANGES[name](objects, tmp_path / "file")


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("operation", ["put", "upload"])
def test_a_paused_request_never_replaces_a_successors_object(
    url: str, exists: bool, operation: str, tmp_path: Path
) -> None:
    """The guard allowed the request; then the process was paused until a successor had written the same object."""
    objects, successor = open_object_store(url), open_object_store(url)
    if exists:
        successor.put("there", b"from before")
    (tmp_path / "file").write_bytes(b"mine")

    def succeed() -> None:
        successor.put("there", b"the successor's")
        guard.lost = True

    guard = objects.guard = Held()
    if not exists:
        guard.meanwhile = succeed
    else:  # the pause is before the second request; the first found that the object exists
        guard.meanwhile = lambda: setattr(guard, "meanwhile", succeed)
    with pytest.raises(StoreError, match="lost the lease"):
        CHANGES[operation](objects, tmp_path / "file")
    assert successor.get("there") == b"the successor's"


def test_a_guarded_write_still_replaces_the_own_object(url: str, tmp_path: Path) -> None:
    objects = open_object_store(url)
    objects.guard = Held()
    for size in (0, 10, PART + 7, 2 * PART):
        (tmp_path / "file").write_bytes(os.urandom(size))
        objects.upload(tmp_path / "file", "uploaded")
        assert objects.get("uploaded") == (tmp_path / "file").read_bytes()
        objects.put("put", b"x", memoryview(b"y" * size))
        assert objects.sizes("") == {"uploaded": size, "put": size + 1}
    objects.delete("put")
    assert list(objects.list("")) == ["uploaded"]


def test_a_large_upload_stops_between_its_parts(url: str, tmp_path: Path) -> None:
    objects = open_object_store(url)
    guard = objects.guard = Held()
    asked = []

    def lose() -> None:
        asked.append(1)
        guard.meanwhile = lose
        guard.lost = len(asked) == 3

    guard.meanwhile = lose
    (tmp_path / "file").write_bytes(bytes(4 * PART))
    with pytest.raises(StoreError, match="lost the lease"):
        objects.upload(tmp_path / "file", "large")
    assert not list(objects.list(""))


def test_deleting_many_objects_checks_the_guard_before_each_request(url: str) -> None:
    objects = open_object_store(url)
    for name in range(5):
        objects.put(f"gen/{name}", b"x")
    guard = objects.guard = Held()
    guard.meanwhile = lambda: setattr(guard, "lost", True)  # after the check that precedes the listing
    with pytest.raises(StoreError, match="lost the lease"):
        objects.delete("gen")
    assert len(list(objects.list("gen"))) == 5


def test_no_request_starts_if_it_may_outlast_the_lease(place: str, leases: list[Lease]) -> None:
    assert MARGIN * Lease(open_object_store(place), "runs/one").seconds >= REQUEST_TIMEOUT
    lease = Lease(open_object_store(place), "runs/one", seconds=600)
    leases.append(lease)
    lease.acquire()
    lease.wait()
    lease._renewed = lease._renewed.later(-400)  # not renewed for that long
    lease.check()
    waiting = threading.Thread(target=lease.wait)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    lease._renewed = lease._renewed.later(400)
    waiting.join(60)
    assert not waiting.is_alive()
    lease._renewed = lease._renewed.later(-601)
    with pytest.raises(StoreError, match="could not be renewed"):
        lease.wait()


def test_a_released_lease_allows_nothing(place: str) -> None:
    lease = Lease(open_object_store(place), "runs/one")
    lease.acquire()
    lease.release()
    with pytest.raises(StoreError, match="released"):
        lease.wait()


def test_other_ranks_lose_the_lease_together_with_the_first(place: str, leases: list[Lease]) -> None:
    first, rank = Lease(open_object_store(place), "runs/one"), Lease(open_object_store(place), "runs/one", seconds=6.0)
    leases += [first, rank]
    first.acquire()
    rank.follow(first.id, Instant.now())
    rank.check()
    leases.append(take_over(place, first))
    deadline = time.monotonic() + 60
    with pytest.raises(StoreError, match="taken over by the successor"):
        while time.monotonic() < deadline:
            rank.check()
            time.sleep(0.01)
    rank.release()
    assert open_object_store(place).exists(KEY), "the successor's lease is left alone"


def test_other_ranks_continue_while_the_first_renews(place: str, leases: list[Lease]) -> None:
    first, rank = (Lease(open_object_store(place), "runs/one", seconds=1.5) for _ in range(2))
    leases += [first, rank]
    first.acquire()
    rank.follow(first.id, Instant.now())
    deadline = time.monotonic() + 60
    while rank.holder is None or rank.holder.renewal < 4:  # it is renewed three times in its duration
        assert time.monotonic() < deadline
        rank.check()
        time.sleep(0.05)
    with pytest.raises(StoreError, match="was lost while this rank joined"):
        Lease(open_object_store(place), "runs/one").follow("another", Instant.now())


# The store.

ORDER = Order(seed=1, samples=64, batch_size=8, num_lanes=2, chunk_size=4, chunks_per_window=2)


def opened(url: str, lease: Lease) -> ZarrStore:
    layout = StateLayout(ORDER, range(2), (2, 2, 3), Encoding("fp32"), torch.device("cpu"))
    store = ZarrStore(layout, f"{url}/state", default=True, guard=lease)
    store.start(0, 0, None)
    return store


def advance(store: ZarrStore, steps: int) -> None:
    for _ in range(steps):
        store.write(store.read() + 1)


def test_the_store_of_a_run_without_its_lease_neither_writes_nor_deletes(place: str, leases: list[Lease]) -> None:
    """This includes pending work of its writers and its cleaner."""
    lease = Lease(open_object_store(place), "runs/one")
    leases.append(lease)
    lease.acquire()
    store = opened(place, lease)
    advance(store, 2 * ORDER.steps_per_epoch)
    store.settle()
    leases.append(take_over(place, lease))
    with pytest.raises(StoreError, match="taken over by the successor"):
        lease.confirm()
    before = open_object_store(f"{place}/state").sizes("")
    store.retain(set())
    with pytest.raises(StoreError, match="lost the lease"):
        advance(store, 3 * ORDER.steps_per_epoch)
    store.close()
    assert open_object_store(f"{place}/state").sizes("") == before


@pytest.mark.parametrize("reinitialize", [False, True])
def test_corruption_caused_by_a_successor_is_reported_as_a_lost_lease(
    place: str, leases: list[Lease], reinitialize: bool
) -> None:
    lease = Lease(open_object_store(place), "runs/one")
    leases.append(lease)
    lease.acquire()
    store = opened(place, lease)
    advance(store, ORDER.steps_per_epoch)
    store.settle()
    began: list[object] = []
    if reinitialize:
        store._table.generations.repair = lambda *damage: began.append(damage)
    leases.append(take_over(place, lease))
    open_object_store(f"{place}/state").delete("gen-000001")
    for lost in ("record", "chunk"):
        if lost == "record":
            store._table._written.clear()
            store._table.generations._records.clear()
        else:
            store._table._written[1, 0] = {0: 0}
        with pytest.raises(StoreError, match=r"lost the lease .* taken over by the successor"):
            store._table.load(1, 0, 0)
    store.close()
    assert not began


# Checkpoints.


def fill(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(os.urandom(500))


def checkpoints(url: str, place: Path, lease: Lease) -> RemoteCheckpoints:
    objects = open_object_store(f"{url}/checkpoints")
    objects.guard = lease
    return RemoteCheckpoints(place, objects)


def test_checkpoints_are_neither_published_nor_pruned_without_the_lease(
    url: str, leases: list[Lease], tmp_path: Path
) -> None:
    lease = Lease(open_object_store(url), "runs/one")
    leases.append(lease)
    lease.acquire()
    first = checkpoints(url, tmp_path / "first", lease)
    for step in (1, 2):
        first.write(step, ALONE, fill)

    def taken_over(directory: Path) -> None:
        fill(directory)
        successor = take_over(url, lease)
        leases.append(successor)
        others = open_object_store(f"{url}/checkpoints")
        others.put(f"step-00000003/{WRITER}", json.dumps({"lease": successor.id}).encode())
        others.put("step-00000003/model.safetensors", b"the successor's")
        with pytest.raises(StoreError, match="taken over"):
            lease.confirm()

    with pytest.raises(CheckpointError, match="lost the lease"):
        first.write(3, ALONE, taken_over)
    with pytest.raises(StoreError, match="lost the lease"):
        first.prune(1)
    objects = open_object_store(f"{url}/checkpoints")
    assert sorted(objects.list("")) == ["step-00000001", "step-00000002", "step-00000003"]
    assert objects.get("step-00000003/model.safetensors") == b"the successor's"
    assert not objects.exists(f"step-00000003/{MANIFEST}")


def test_pruning_keeps_checkpoints_written_under_another_lease(url: str, leases: list[Lease], tmp_path: Path) -> None:
    lease = Lease(open_object_store(url), "runs/one")
    leases.append(lease)
    lease.acquire()
    objects = open_object_store(f"{url}/checkpoints")
    objects.put("step-00000001/model.safetensors", b"left by a run that was killed")
    kept = checkpoints(url, tmp_path, lease)
    assert kept.newest_valid() is None
    for step in (2, 3):
        kept.write(step, ALONE, fill)
    objects.put(f"step-00000004/{WRITER}", json.dumps({"lease": "another"}).encode())
    objects.put(f"step-00000005/{WRITER}", json.dumps({"lease": lease.id}).encode())
    kept.prune(1)
    assert sorted(objects.list("")) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_pruning_keeps_older_checkpoints_unless_the_newest_is_complete(
    url: str, leases: list[Lease], tmp_path: Path, damage: str
) -> None:
    lease = Lease(open_object_store(url), "runs/one")
    leases.append(lease)
    lease.acquire()
    kept = checkpoints(url, tmp_path, lease)
    for step in (1, 2):
        kept.write(step, ALONE, fill)
    objects = open_object_store(f"{url}/checkpoints")
    key = "step-00000002/model.safetensors"
    objects.delete(key)
    if damage == "cut":
        objects.put(key, b"cut")
    with pytest.raises(CheckpointError, match=r"step-00000002/model.safetensors .*Older checkpoints stay"):
        kept.prune(1)
    assert sorted(objects.list("")) == ["step-00000001", "step-00000002"]
