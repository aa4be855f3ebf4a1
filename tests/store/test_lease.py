"""One run at a time writes to a store; a crashed run's lease comes free; a lost lease stops its run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from udddm.store.errors import StoreError
from udddm.store.lease import GRACE, KEY, Holder, Lease, process_identity
from udddm.store.objects import Objects, Retry, open_objects
from udddm.testing.s3 import BUCKET

HOLD = """
import sys, time
from udddm.store.lease import Lease
from udddm.store.objects import open_objects
lease = Lease(open_objects(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
lease.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "objects")
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"
    return f"memory://udddm/{uuid.uuid4().hex}"


@pytest.fixture
def objects(place: str) -> Objects:
    return open_objects(place)


def rewrite(objects: Objects, **changes: object) -> None:
    """Change what the lease says, as its owner or another would have written it."""
    held = json.loads(objects.get(KEY))
    objects.put(KEY, json.dumps({**held, **changes}).encode())


def crashed(place: str, owner: str, seconds: float) -> int:
    """A process takes the lease and is killed; its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place, owner, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return process.pid


def test_a_second_run_is_told_who_holds_it_and_what_to_do(objects: Objects) -> None:
    first, second = Lease(objects, "runs/one"), Lease(objects, "runs/two")
    first.acquire()
    with pytest.raises(StoreError) as caught:
        second.acquire()
    message = str(caught.value)
    for part in (objects.describe(""), "runs/one", os.uname().nodename, str(os.getpid()), "UTC", "75 s", "another URL"):
        assert part in message, message
    first.check()
    first.release()
    assert not objects.exists(KEY)
    second.acquire()
    second.check()
    second.release()
    second.release()


def test_of_many_that_start_together_one_gets_it(place: str) -> None:
    leases = [Lease(open_objects(place), f"runs/{i}") for i in range(6)]

    def acquire(lease: Lease) -> bool:
        try:
            lease.acquire()
        except StoreError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(acquire, leases))
    assert sum(won) == 1
    for lease in leases:
        lease.release()
    assert not open_objects(place).exists(KEY)


def test_it_is_renewed_while_it_is_held(objects: Objects) -> None:
    lease = Lease(objects, "runs/one", seconds=0.6)
    lease.acquire()
    began = time.monotonic()
    renewals = set()
    while time.monotonic() - began < 1.2:
        lease.check()
        renewals.add(json.loads(objects.get(KEY))["renewal"])
        with pytest.raises(StoreError, match="runs/one"):
            Lease(objects, "runs/two").acquire()
        time.sleep(0.05)
    lease.release()
    assert len(renewals) >= 4


def test_an_expired_lease_is_taken_over_after_a_grace(objects: Objects) -> None:
    Lease(objects, "runs/one").acquire()  # and never heard of again
    late = time.time() - GRACE * 60
    rewrite(objects, expires=late + 1, lease="x", pid=1)
    with pytest.raises(StoreError, match="runs/one"):
        Lease(objects, "runs/two").acquire()
    rewrite(objects, expires=late - 1)
    second = Lease(objects, "runs/two")
    second.acquire()
    assert json.loads(objects.get(KEY))["owner"] == "runs/two"
    second.release()


def test_patience_waits_for_the_expiry(objects: Objects) -> None:
    objects.put(KEY, holder("runs/one", seconds=0.4, expires=time.time() + 0.4).encode())
    second = Lease(objects, "runs/two")
    began = time.monotonic()
    second.acquire(patience=20)
    assert 0.4 <= time.monotonic() - began < 5
    second.release()


def holder(owner: str, **changes: object) -> Holder:
    now = time.time()
    made = Holder(owner, os.uname().nodename, 1, process_identity(1), now, "another", 0, 60.0, now + 60)
    return dataclasses.replace(made, **changes)


def test_a_crashed_run_takes_its_own_lease_again_at_once(place: str) -> None:
    if place.startswith("memory://"):
        pytest.skip("another process has other memory")
    pid = crashed(place, "runs/one", 60)
    objects = open_objects(place)
    assert json.loads(objects.get(KEY))["pid"] == pid
    with pytest.raises(StoreError, match=f"runs/one .* process {pid}"):
        Lease(objects, "runs/two").acquire()
    again = Lease(objects, "runs/one")
    again.acquire()
    again.release()


def test_a_crashed_runs_lease_comes_free_for_others(place: str) -> None:
    if place.startswith("memory://"):
        pytest.skip("another process has other memory")
    crashed(place, "runs/one", 0.5)
    other = Lease(open_objects(place), "runs/two")
    other.acquire(patience=20)
    other.release()


def test_own_leases_of_other_hosts_and_living_processes_are_respected(objects: Objects) -> None:
    for changes in (
        {"host": "elsewhere", "process": "gone"},
        {"pid": os.getpid(), "process": process_identity(os.getpid())},
    ):
        objects.put(KEY, holder("runs/one", **changes).encode())
        with pytest.raises(StoreError, match="runs/one"):
            Lease(objects, "runs/one").acquire()


def test_a_process_id_that_came_again_is_another_process(objects: Objects) -> None:
    objects.put(KEY, holder("runs/one", pid=os.getpid(), process="an earlier boot").encode())
    again = Lease(objects, "runs/one")
    again.acquire()
    again.release()


@pytest.mark.parametrize("how", ["taken", "deleted"])
def test_a_lost_lease_stops_the_run(objects: Objects, how: str) -> None:
    lease = Lease(objects, "runs/one", seconds=3.0)
    lease.acquire()
    if how == "taken":
        objects.put(KEY, holder("runs/two").encode())
        said = "taken over by runs/two"
    else:
        objects.delete(KEY)
        said = "deleted"
    deadline = time.monotonic() + 10
    with pytest.raises(StoreError, match=f"lost the lease of .*: .*{said}.*The last checkpoint is intact"):
        while time.monotonic() < deadline:
            lease.check()
            time.sleep(0.01)
    lease.release()
    assert objects.exists(KEY) is (how == "taken"), "another's lease is left alone"


def test_a_lease_that_cannot_be_renewed_stops_the_run_in_time(tmp_path: Path) -> None:
    objects = open_objects(tmp_path / "objects")
    objects.retry = Retry(attempts=1)
    lease = Lease(objects, "runs/one", seconds=0.3)
    lease.acquire()

    def unreachable(*_: object) -> bool:
        raise OSError("the network is gone")

    objects._replace_if = unreachable  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"could not be renewed for 0\.3 s"):
        while time.monotonic() - began < 10:
            lease.check()
            time.sleep(0.01)
    assert time.monotonic() - began < 2
    lease.release()


def test_a_damaged_lease_is_an_error_with_a_cure(objects: Objects) -> None:
    objects.put(KEY, b"{")
    with pytest.raises(StoreError, match=r"damaged .*delete it when no run writes there"):
        Lease(objects, "runs/one").acquire()
