"""Only one run at a time writes to a store; a crashed run's lease expires; a lost lease stops its run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from udddm.errors import StoreError
from udddm.storage import open_object_store
from udddm.storage.base import ObjectStore, Retry
from udddm.storage.lease import GRACE, KEY, Holder, Lease, process_identity, process_table

YEAR = 365 * 86_400.0
HOLD = """
import sys, time
from udddm.storage.lease import Lease
from udddm.storage import open_object_store
lease = Lease(open_object_store(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
lease.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def objects(place: str) -> ObjectStore:
    return open_object_store(place)


class Clock:
    """The time of the lease's module: it passes in `sleep` only, which calls `meanwhile`. Clocks of hosts are real."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None):
        self.now, self.meanwhile = time.monotonic(), meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("udddm.storage.lease.time", made)
    return made


def crashed(place: str, owner: str, seconds: float) -> int:
    """Start a process that acquires the lease, kill it, and return its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place, owner, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return process.pid


def test_a_second_run_gets_an_error_with_the_holder_and_what_to_do(objects: ObjectStore) -> None:
    first, second = Lease(objects, "runs/one"), Lease(objects, "runs/two")
    first.acquire()
    with pytest.raises(StoreError) as caught:
        second.acquire()
    message = str(caught.value)
    for part in (objects.uri(""), "runs/one", os.uname().nodename, str(os.getpid()), "UTC", "75 s", "another URL"):
        assert part in message, message
    first.check()
    first.release()
    assert not objects.exists(KEY)
    second.acquire()
    second.check()
    second.release()
    second.release()


def test_of_many_runs_that_start_together_one_gets_the_lease(place: str) -> None:
    leases = [Lease(open_object_store(place), f"runs/{i}") for i in range(6)]

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
    assert not open_object_store(place).exists(KEY)


def test_a_lease_is_renewed_while_it_is_held(objects: ObjectStore) -> None:
    lease = Lease(objects, "runs/one", seconds=0.6)
    lease.acquire()
    deadline = time.monotonic() + 60
    renewals = set()
    while len(renewals) < 5:  # it is renewed three times in its duration
        assert time.monotonic() < deadline
        lease.check()
        renewals.add(json.loads(objects.get(KEY))["renewal"])
        with pytest.raises(StoreError, match="runs/one"):
            Lease(objects, "runs/two").acquire()
        time.sleep(0.05)
    lease.release()


@pytest.mark.parametrize("ahead", [-YEAR, 0, YEAR])
def test_a_lease_is_taken_over_once_seen_unchanged_for_long_enough(
    objects: ObjectStore, clock: Clock, ahead: float
) -> None:
    """For its duration plus the grace time by the observer's clock, regardless of the holder's clock."""
    now, began = time.time() + ahead, clock.now
    objects.put(KEY, holder("runs/one", seconds=8.0, started=now, expires=now + 8).encode())
    second = Lease(objects, "runs/two")
    second.acquire(patience=20)
    assert 8 * (1 + GRACE) < clock.now - began < 12
    assert json.loads(objects.get(KEY))["owner"] == "runs/two"
    second.release()


@pytest.mark.parametrize("ahead", [-YEAR, 0, YEAR])
def test_a_renewed_lease_is_not_taken_over(objects: ObjectStore, clock: Clock, ahead: float) -> None:
    began = clock.now

    renewals: list[int] = []

    def renew() -> None:  # every second, like a host with a wrong clock
        renewal, expires = int(clock.now - began), time.time() + ahead + 3
        if renewal not in renewals:
            renewals.append(renewal)
            objects.put(KEY, holder("runs/one", seconds=3.0, renewal=renewal, expires=expires).encode())

    renew()
    clock.meanwhile = renew
    with pytest.raises(StoreError, match="runs/one"):
        Lease(objects, "runs/two").acquire(patience=12)
    assert clock.now - began >= 12


def test_a_lease_that_seems_expired_is_watched_even_without_patience(objects: ObjectStore, clock: Clock) -> None:
    past, began = time.time() - YEAR, clock.now
    objects.put(KEY, holder("runs/one", seconds=8.0, started=past, expires=past).encode())
    second = Lease(objects, "runs/two")
    second.acquire()
    assert clock.now - began > 8 * (1 + GRACE)
    second.release()


def test_the_message_explains_how_to_remove_a_lease(objects: ObjectStore) -> None:
    objects.put(KEY, holder("runs/one").encode())
    with pytest.raises(StoreError) as caught:
        Lease(objects, "runs/two").acquire()
    assert f"If that process has certainly ended, you may also delete {objects.uri(KEY)}" in str(caught.value)


@pytest.mark.parametrize("clock", ["monotonic", "clock_gettime", "time"])
def test_a_holder_uses_the_clock_that_shows_the_most(
    tmp_path: Path, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monotonic clock of a paused machine stops; the boot clock of a sleeping one does not."""
    lease = Lease(open_object_store(tmp_path), "runs/one", seconds=600)
    lease.acquire()
    lease.check()
    real = getattr(time, clock)
    monkeypatch.setattr(time, clock, lambda *given: real(*given) + 601)
    with pytest.raises(StoreError, match="could not be renewed for 600 s"):
        lease.check()
    lease.release()


@pytest.mark.parametrize("clock", ["monotonic", "time"])
def test_a_stopped_or_set_back_clock_does_not_extend_a_lease(
    tmp_path: Path, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(open_object_store(tmp_path), "runs/one", seconds=600)
    lease.acquire()
    real = {name: getattr(time, name) for name in ("monotonic", "time", "clock_gettime")}
    for name in real:
        ahead = -5.0 if name == clock else 601.0
        monkeypatch.setattr(time, name, lambda *given, name=name, ahead=ahead: real[name](*given) + ahead)
    with pytest.raises(StoreError, match="could not be renewed for 600 s"):
        lease.check()
    monkeypatch.undo()
    lease.release()


def holder(owner: str, **changes: object) -> Holder:
    now = time.time()
    made = Holder(owner, os.uname().nodename, 1, process_identity(1), now, "another", 0, 60.0, now + 60)
    return dataclasses.replace(made, **changes)


def test_a_crashed_run_reacquires_its_lease_immediately(place: str) -> None:
    if place.startswith("memory://"):
        pytest.skip("another process has other memory")
    pid = crashed(place, "runs/one", 60)
    objects = open_object_store(place)
    assert json.loads(objects.get(KEY))["pid"] == pid
    with pytest.raises(StoreError, match=f"runs/one .* process {pid}"):
        Lease(objects, "runs/two").acquire()
    again = Lease(objects, "runs/one")
    again.acquire()
    again.release()


def test_a_crashed_runs_lease_expires_for_others(place: str) -> None:
    if place.startswith("memory://"):
        pytest.skip("another process has other memory")
    crashed(place, "runs/one", 0.5)
    other = Lease(open_object_store(place), "runs/two")
    other.acquire(patience=20)
    other.release()


HERE = process_table()


@pytest.mark.parametrize(
    "changes",
    [
        {"process": "gone"},  # as written by older versions, without the scope of the process id
        {"process": "gone", "machine": HERE.replace(HERE.split()[0], "0" * 32)},
        {"process": "gone", "machine": HERE.replace(HERE.split()[1], str(uuid.uuid4()))},
        {"process": "gone", "machine": HERE.replace(HERE.split()[2], "4026531999")},
        {"process": process_identity(os.getpid()), "machine": HERE, "pid": os.getpid()},
    ],
    ids=["an older version", "machine", "boot", "PID namespace", "alive"],
)
def test_own_leases_of_processes_that_may_be_alive_are_respected(
    objects: ObjectStore, changes: dict[str, object]
) -> None:
    """Containers and machines may share a name, and a process id is meaningless outside its namespace."""
    objects.put(KEY, holder("runs/one", **changes).encode())
    with pytest.raises(StoreError, match="runs/one"):
        Lease(objects, "runs/one").acquire()


def test_a_reused_process_id_is_a_different_process(objects: ObjectStore) -> None:
    objects.put(KEY, holder("runs/one", pid=os.getpid(), process="started earlier", machine=HERE).encode())
    again = Lease(objects, "runs/one")
    again.acquire()
    again.release()


def test_a_lease_of_an_older_version_is_read(objects: ObjectStore, clock: Clock) -> None:
    written = json.loads(holder("runs/one", seconds=8.0).encode())
    del written["machine"]
    objects.put(KEY, json.dumps(written).encode())
    second = Lease(objects, "runs/two")
    second.acquire(patience=20)
    second.release()


@pytest.mark.parametrize("how", ["taken", "deleted"])
def test_a_lost_lease_stops_the_run(objects: ObjectStore, how: str) -> None:
    lease = Lease(objects, "runs/one", seconds=1.5)
    lease.acquire()
    if how == "taken":
        objects.put(KEY, holder("runs/two").encode())
        said = "taken over by runs/two"
    else:
        objects.delete(KEY)
        said = "deleted"
    deadline = time.monotonic() + 10
    with pytest.raises(StoreError, match=f"lost the lease of .*: .*{said}.*Checkpoints are intact"):
        while time.monotonic() < deadline:
            lease.check()
            time.sleep(0.01)
    lease.release()
    assert objects.exists(KEY) is (how == "taken"), "another's lease is left alone"


def test_a_lease_that_cannot_be_renewed_stops_the_run_in_time(tmp_path: Path) -> None:
    objects = open_object_store(tmp_path / "objects")
    objects.retry = Retry(attempts=1)
    lease = Lease(objects, "runs/one", seconds=0.3)
    lease.acquire()

    def unreachable(*_: object) -> bool:
        raise OSError("the network is gone")

    objects._compare_and_swap = unreachable  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"could not be renewed for 0\.3 s"):
        while time.monotonic() - began < 10:
            lease.check()
            time.sleep(0.01)
    assert time.monotonic() - began < 2
    lease.release()


def test_a_lease_is_not_taken_over_without_conditional_writes(tmp_path: Path, clock: Clock) -> None:
    """Two runs that take it over at the same moment would both hold it."""
    place = f"local://{tmp_path}/objects"
    objects = open_object_store(place)
    first = Lease(objects, "runs/one")
    first.acquire()
    first._stopping.set()
    objects.put(KEY, holder("runs/gone", seconds=8.0).encode())
    with pytest.raises(StoreError, match=r"no conditional writes.*delete .*lease.json"):
        Lease(objects, "runs/two").acquire(patience=20)
    objects.delete(KEY)
    second = Lease(objects, "runs/two", seconds=0.9)
    second.acquire()
    deadline = time.monotonic() + 60
    while not json.loads(objects.get(KEY))["renewal"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second.release()


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"7",
        b"{}",
        b"[" * 5000,
        *(
            json.dumps({**json.loads(Holder("o", "h", 1, "p", 0.0, "l", 0, 60.0, 1.0).encode()), name: value}).encode()
            for name, value in [("seconds", 1e308), ("seconds", "60"), ("expires", float("nan")), ("pid", None)]
        ),
    ],
)
def test_a_damaged_lease_is_an_error_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    objects = open_object_store(tmp_path)
    objects.put(KEY, content)
    with pytest.raises(StoreError, match=r"damaged .*delete it when no run writes there"):
        Lease(objects, "runs/one").acquire()
