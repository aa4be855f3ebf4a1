"""Object stores on disk, S3 and fsspec file systems obey one contract; failures are retried or raise a clear error."""

from __future__ import annotations

import itertools
import secrets
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from udddm.errors import CorruptChunkError, StoreError
from udddm.order import Order
from udddm.storage import open_object_store
from udddm.storage.base import ObjectStore, PermanentStorageError, Retry
from udddm.storage.failures import of_fsspec, refusal
from udddm.storage.filesystem import FsspecObjectStore
from udddm.storage.local import LocalObjectStore
from udddm.storage.s3 import S3ObjectStore
from udddm.store import Encoding
from udddm.store.generations import Generations
from udddm.testing.faults import BROKEN, ERRORS, FaultProxy
from udddm.testing.s3 import BUCKET, S3Server

QUICK = Retry(attempts=4, first_pause=0.001, longest_pause=0.004)


@pytest.fixture
def objects(place: str) -> ObjectStore:
    opened = open_object_store(place)
    opened.retry = QUICK
    return opened


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def remote(proxy: FaultProxy) -> S3ObjectStore:
    """S3 through the proxy, with a timeout of one second."""
    opened = S3ObjectStore(f"{BUCKET}/{uuid.uuid4().hex}", timeout=0.5)
    opened.retry = QUICK
    return opened


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all its causes and contexts."""
    while error is not None:
        yield error
        if error.__cause__ is not None and error.__context__ is not error.__cause__:
            yield from chain(error.__context__)
        error = error.__cause__ or error.__context__


# The contract.


def test_open_object_store_selects_the_class_by_url(place: str, objects: ObjectStore) -> None:
    kinds = {"s3": S3ObjectStore, "memory": FsspecObjectStore}
    assert type(objects) is kinds.get(place.partition("://")[0], LocalObjectStore)
    assert open_object_store(place + "/").uri("") == objects.uri("") == place
    assert objects.uri("a/b") == f"{place}/a/b"
    assert not list(objects.list(""))


def test_put_get_overwrite_delete(objects: ObjectStore) -> None:
    objects.put("a/b/one", b"1")
    objects.put("a/b/one", b"first ", memoryview(b"second"), np.arange(2, dtype="<i2").data)
    objects.put("a/two", b"")
    assert objects.get("a/b/one") == b"first second\0\0\1\0"
    assert objects.get("a/two") == b""
    assert sorted(objects.list("a")) == ["b", "two"]
    assert (objects.exists("a/two"), objects.exists("a/b"), objects.exists("a/tw")) == (True, True, False)
    objects.delete("a/two")
    objects.delete("a/two")
    assert list(objects.list("a")) == ["b"]
    with pytest.raises(FileNotFoundError):
        objects.get("a/two")
    assert objects.retries == 0


def test_deleting_a_prefix_deletes_all_of_it_and_nothing_else(objects: ObjectStore) -> None:
    for key in ("g/c/1/0/0/0", "g/c/1/1/0/0", "g/c/10/0/0/0", "g/x.json", "g-2/x", "h/c/1/0"):
        objects.put(key, b"x")
    objects.delete("g/c/1")
    assert list(objects.list("g/c")) == ["10"]
    assert sorted(objects.list("g")) == ["c", "x.json"]
    objects.delete("g")
    assert sorted(objects.list("")) == ["g-2", "h"], "a deleted prefix must not stay in listings"
    assert not list(objects.list("g")) and not list(objects.list("g/c"))
    objects.delete("nonesuch")
    objects.delete("nonesuch/deeper")


def test_odd_keys(objects: ObjectStore) -> None:
    keys = ["a b+c/é%20 ü", "d/~!$&'()*,;=@^_`{}", "d/…", "d/" + "x" * 200, "e.f/-", "e.f/g.partial-1"]
    for key in keys:
        objects.put(key, key.encode())
    assert all(objects.get(key) == key.encode() for key in keys)
    assert sorted(objects.list("d")) == sorted(k[2:] for k in keys if k.startswith("d/"))
    assert list(objects.list("a b+c")) == ["é%20 ü"]


def test_large_objects_replace_one_another_atomically(place: str, objects: ObjectStore) -> None:
    """A concurrent reader sees one of the written objects in full."""
    size = 8 * 2**20
    written = [bytes([value]) * size for value in range(4)]
    objects.put("large", written[0])
    seen: list[bytes] = []
    over = threading.Event()
    reader_objects = open_object_store(place)

    def read() -> None:
        while not over.is_set():
            seen.append(reader_objects.get("large"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for data in written:
            objects.put("large", data[: size // 2], memoryview(data)[size // 2 :])
    finally:
        over.set()
        reader.join()
    assert seen and all(data in written for data in seen)
    assert objects.get("large") == written[-1]


def test_listings_include_what_other_clients_just_wrote(place: str, objects: ObjectStore) -> None:
    other = open_object_store(place)
    assert not list(objects.list("n")) and not list(other.list("n"))
    for count in range(1, 6):
        other.put(f"n/{count}", b"x")
        assert len(list(objects.list("n"))) == count
        assert objects.exists(f"n/{count}")
    other.delete("n")
    assert not list(objects.list("n"))


def test_long_listings_are_complete(s3: S3Server) -> None:
    """S3 lists and deletes 1,000 objects per request."""
    objects = open_object_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: objects.put(f"many/{i}", b"x"), range(1010)))
    assert set(objects.list("many")) == {str(i) for i in range(1010)}
    objects.delete("many")
    assert not list(objects.list(""))


def test_concurrent_clients(place: str) -> None:
    def client(number: int) -> None:
        mine = open_object_store(place)
        for turn in range(10):
            mine.put(f"own/{number}", f"{number}-{turn}".encode() * 1000)
            mine.put("shared", f"{number}-{turn};".encode() * 1000)
            assert mine.get(f"own/{number}") == f"{number}-{turn}".encode() * 1000
            assert len(set(mine.get("shared").split(b";")[:-1])) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    assert len(list(open_object_store(place).list("own"))) == 4


def test_put_if_absent_succeeds_for_one_of_many_clients(place: str) -> None:
    clients = [open_object_store(place) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: clients[i].put_if_absent("d/only", f"{i}".encode()), range(8)))
    assert sum(won) == 1
    assert clients[0].get("d/only") == f"{won.index(True)}".encode()
    assert list(clients[0].list("d")) == ["only"]


def test_compare_and_swap_succeeds_for_one_of_many_clients(place: str) -> None:
    clients = [open_object_store(place) for _ in range(8)]
    assert not clients[0].compare_and_swap("d/it", b"new", b"old")
    clients[0].put("d/it", b"old")
    assert not clients[0].compare_and_swap("d/it", b"new", b"other")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: clients[i].compare_and_swap("d/it", f"{i}".encode(), b"old"), range(8)))
    assert sum(won) == 1
    assert clients[0].get("d/it") == f"{won.index(True)}".encode()
    assert list(clients[0].list("d")) == ["it"]


ORDER = Order(samples=50, batch_size=8, num_lanes=2, chunk_size=4, chunks_per_window=3, seed=1)


def test_generations_round_trip_and_zarr_reads_them(place: str, objects: ObjectStore) -> None:
    stored = Generations(objects, ORDER, (2, 3, 3), Encoding("fp16"))
    stored.create()
    stored.begin(1)
    random = np.random.default_rng(0)
    rows = {}
    for lane in range(ORDER.num_lanes):
        for chunk in range(ORDER.num_chunks(lane)):
            shape = (ORDER.chunk_slots(lane, chunk), 2, 3, 3)
            rows[lane, chunk] = random.normal(size=shape).astype(np.float16)
        checksums = {c: stored.write(1, lane, c, rows[lane, c]) for c in range(ORDER.num_chunks(lane))}
        stored.complete(1, lane, checksums)
    again = Generations(open_object_store(place), ORDER, (2, 3, 3), Encoding("fp16"))
    again.create()
    assert again.is_complete(1)
    for (lane, chunk), wanted in rows.items():
        assert (again.read(1, lane, chunk, again.record(1, lane)[chunk]) == wanted).all()
    if not place.startswith("s3://"):  # zarr itself uses s3fs for S3, whose threads outlive a test
        array = zarr.open_array(f"{place}/gen-000001", mode="r")
        assert (array[1, : ORDER.chunk_size] == rows[1, 0]).all()
    objects.delete(again.chunk_key(1, 0, 1))
    with pytest.raises(CorruptChunkError, match="lane 0, chunk 1 is damaged: it is missing"):
        again.read(1, 0, 1, again.record(1, 0)[1])
    stored.delete(1, range(2))
    assert stored.existing() == []


# Faults between client and S3, by name.

OPERATIONS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda o: o.get("there"),
    "put": lambda o: o.put("new", b"x" * 1000),
    "list": lambda o: list(o.list("")),
    "delete": lambda o: o.delete("there"),
    "put_if_absent": lambda o: o.put_if_absent("new", b"mine"),
    "compare_and_swap": lambda o: o.compare_and_swap("there", b"mine", b"there" * 1000),
}
TRANSIENT = ["slow-down", "too-many", "internal", "bad-gateway", *BROKEN]
NON_RETRYABLE = {
    "expired-token": ("have expired", "AWS_SESSION_TOKEN"),
    "expired-token-403": ("have expired", "AWS_SESSION_TOKEN"),
    "access-denied": ("access is denied", "allow these credentials to read"),
    "signature": ("signature does not match", "AWS_SECRET_ACCESS_KEY"),
    "unknown-key": ("does not know the access key", "AWS_ACCESS_KEY_ID"),
    "no-bucket": ("the bucket does not exist", "create the bucket"),
    "clock": ("clock is wrong", "set the clock"),
}


def test_every_fault_is_tested() -> None:
    assert {*ERRORS, *BROKEN} == {*TRANSIENT, *NON_RETRYABLE}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_transient_fault_is_retried(fault: str, operation: str, proxy: FaultProxy, remote: S3ObjectStore) -> None:
    if fault == "cut" and operation in ("put", "put_if_absent"):
        pytest.skip("the reply to a put has no body that could be cut")
    wanted = OPERATIONS[operation]
    remote.put("there", b"there" * 1000)
    times = 1 if fault == "stall" else 2
    with proxy.failing(fault, times):
        result = wanted(remote)
        assert proxy.failed == times
    assert remote.retries == times
    if operation == "get":
        assert result == b"there" * 1000
    elif operation == "list":
        assert result == ["there"]
    elif operation in ("put_if_absent", "compare_and_swap"):
        assert result is True, "the first attempt may have succeeded; then the object is ours"
        assert remote.get("new" if operation == "put_if_absent" else "there") == b"mine"
    else:
        assert remote.exists("new") is (operation == "put")
        assert remote.exists("there") is (operation != "delete")


@pytest.mark.parametrize("fault", ["slow-down", "reset", "cut"])
def test_a_persistent_fault_ends_in_one_clear_error(fault: str, proxy: FaultProxy, remote: S3ObjectStore) -> None:
    remote.put("there", b"x" * 1000)
    with (
        proxy.failing(fault, 100),
        pytest.raises(StoreError, match=r"cannot read s3://.*/there: .* \(tried 4 times\).*same command again"),
    ):
        remote.get("there")
    assert remote.retries == 3 and proxy.failed == 4


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", NON_RETRYABLE)
def test_a_permanent_failure_raises_at_once_with_its_remedy(
    fault: str, operation: str, proxy: FaultProxy, remote: S3ObjectStore, s3: S3Server
) -> None:
    what, remedy = NON_RETRYABLE[fault]
    with proxy.failing(fault, 100), pytest.raises(StoreError) as caught:
        OPERATIONS[operation](remote)
    assert (remote.retries, proxy.failed) == (0, 1)
    message = str(caught.value)
    assert what in message and remedy in message and str(ERRORS[fault][0]) in message and "s3://" in message
    assert "Checkpoints are intact" in message
    for error in chain(caught.value):
        assert s3.key not in repr(error) and s3.secret not in repr(error), error
        assert "Signature=" not in repr(error), error


def test_no_credentials_in_any_error(
    proxy: FaultProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = secrets.token_hex(30)
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    remote = open_object_store(f"s3://{BUCKET}/x")
    remote.retry = Retry(attempts=2, first_pause=0.001)
    for fault, operation in itertools.product(
        ["slow-down", "expired-token", "signature", "reset"], OPERATIONS.values()
    ):
        with proxy.failing(fault, 100), pytest.raises(StoreError) as caught:
            operation(remote)
        shown = "".join(repr(error) + str(error) for error in chain(caught.value)) + caplog.text
        assert not [secret for secret in (s3.key, s3.secret, token) if secret in shown]


def test_the_server_refuses_wrong_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="signature does not match") as caught:
        open_object_store(f"s3://{BUCKET}/x").get("y")
    assert not [error for error in chain(caught.value) if s3.key in repr(error)]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError, match="does not know the access key"):
        open_object_store(f"s3://{BUCKET}/x").put("y", b"")


def test_an_unreachable_server(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    nowhere = open_object_store(f"s3://{BUCKET}/x")
    nowhere.retry = QUICK
    with pytest.raises(StoreError, match=r"the server refuses connections \(tried 4 times\)"):
        nowhere.get("y")


def test_missing_credentials_are_reported_as_missing(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # the endpoint of a machine's role
    with pytest.raises(StoreError, match="no credentials in the environment"):
        open_object_store(f"s3://{BUCKET}/x").get("y")


def test_a_stall_costs_the_timeout_and_latency_only_time(proxy: FaultProxy, remote: S3ObjectStore) -> None:
    proxy.latency = 0.05
    remote.put("there", b"x")
    proxy.fail("stall")
    began = time.monotonic()
    assert remote.get("there") == b"x"
    assert 0.5 <= time.monotonic() - began < 5
    assert remote.retries == 1


def test_a_chunk_is_put_in_one_request(proxy: FaultProxy, remote: S3ObjectStore) -> None:
    remote.put("chunk", bytes(8 * 2**20), b"four")
    assert proxy.requests == ["PUT"]
    assert len(remote.get("chunk")) == 8 * 2**20 + 4


def test_pauses_grow_to_the_longest_and_total_time_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Failing(LocalObjectStore):
        def _get(self, key: str) -> bytes:
            raise OSError("broken")

    pauses: list[float] = []
    objects = Failing(tmp_path)
    objects.retry = Retry(attempts=7, first_pause=1, longest_pause=4)
    monkeypatch.setattr(objects._closed, "wait", pauses.append)
    with pytest.raises(StoreError, match="tried 7 times"):
        objects.get("x")
    assert all(low / 2 <= pause <= low * 1.5 for pause, low in zip(pauses, [1, 2, 4, 4, 4, 4], strict=True))
    objects.retry = Retry(attempts=7, longest_total=-1)
    with pytest.raises(StoreError, match="tried 1 times"):
        objects.get("x")


def test_close_ends_the_wait_for_another_attempt(proxy: FaultProxy, remote: S3ObjectStore) -> None:
    remote.retry = Retry(attempts=5, first_pause=60, longest_pause=60)
    proxy.fail("slow-down", 100)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            remote.get("there")
        except StoreError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not remote.retries:
        time.sleep(0.01)
    remote.close()
    waiting.join(5)
    assert not waiting.is_alive() and failures


# URLs and packages.


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3:/bucket/x", "two slashes"),
        ("s3://", "give a bucket name"),
        ("s3:///x", "give a bucket name"),
        ("s3://a b/x", "give a bucket name"),
        ("nonesuch://x/y", "do not support nonesuch:// URLs"),
        ("1://x", "do not support 1:// URLs"),
        ("simplecache::s3://b/x", "do not support"),
    ],
)
def test_malformed_urls(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=r"store\.url") as caught:
        open_object_store(url)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://key:hush@bucket/x", "s3://hush@bucket/x", "sftp://me:hush@host/x", "az://c/x?sig=hush", "s3://b#hush"]
)
def test_secrets_in_a_url_are_refused(url: str) -> None:
    with pytest.raises(
        StoreError, match=r"remove the .* from the URL; give credentials in environment variables"
    ) as caught:
        open_object_store(url)
    assert not [error for error in chain(caught.value) if "hush" in str(error)]


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "ftp://x", "http://key:hush@host"])
def test_a_malformed_endpoint(endpoint: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL is not a URL") as caught:
        open_object_store(f"s3://{BUCKET}")
    assert "hush" not in str(caught.value)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"pip install 'udddm\[s3\]'"):
        open_object_store("s3://bucket/x")

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(StoreError, match="sftp://bucket/x: Please install gcsfs"):
        open_object_store("sftp://bucket/x")


def test_classification_of_server_replies() -> None:
    for status, code in [(503, "SlowDown"), (400, "RequestTimeout"), (409, "ConditionalRequestConflict"), (500, "")]:
        assert isinstance(refusal(status, code), OSError)
    for status, code in [
        (501, "NotImplemented"),
        (403, ""),
        (301, "PermanentRedirect"),
        (404, ""),
        (400, "InvalidUri"),
    ]:
        assert isinstance(refusal(status, code), PermanentStorageError)


class _HttpError(Exception):
    def __init__(self, code: int):
        self.code = code
        super().__init__("with hush in it")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("hush"), FileNotFoundError),
        (_HttpError(503), OSError),
        (_HttpError(429), OSError),
        (TimeoutError("hush"), OSError),
        (ConnectionResetError(104, "hush"), OSError),
        (_HttpError(403), PermanentStorageError),
        (_HttpError(400), PermanentStorageError),
        (PermissionError(13, "hush"), PermanentStorageError),
        (NotImplementedError("hush"), PermanentStorageError),
        (KeyError("hush"), PermanentStorageError),
    ],
    ids=repr,
)
def test_classification_of_file_system_errors(error: Exception, kind: type[Exception]) -> None:
    found = of_fsspec(error)
    assert type(found) is kind
    assert "hush" not in repr(found)


def test_a_directory_deleted_during_a_local_write_is_recreated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks delete their lanes of an old generation, and the last one its directory, while another may still write."""
    import shutil

    objects = LocalObjectStore(tmp_path)
    replace, removed = Path.replace, []

    def racing(self: Path, target: Path) -> Path:
        if not removed:
            removed.append(target)
            shutil.rmtree(tmp_path / "gen")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", racing)
    objects.put("gen/c/0", b"rows")
    assert removed and objects.get("gen/c/0") == b"rows" and objects.retries == 1


def test_google_and_azure_have_conditional_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They use obstore, whose own tests cover their servers. This only tests that obstore opens them."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for url in ("gs://bucket/some/where", "gcs://bucket/some/where", "az://container/some/where"):
        opened = open_object_store(url)
        assert isinstance(opened, S3ObjectStore) and opened.conditional
        assert opened.uri("key") == f"{url}/key".replace("gcs://", "gs://")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(StoreError, match=r"cannot open az://container/x: .*AZURE_STORAGE_ variables"):
        open_object_store("az://container/x")
    assert not open_object_store(f"local:///tmp/{uuid.uuid4().hex}").conditional
    assert open_object_store("memory://a").conditional, "nobody else sees it"


def test_the_server_ends_with_a_process_that_is_killed(s3: S3Server) -> None:
    """`s3`, only to skip this test where there is no server."""
    program = """
import time
from udddm.testing import s3
with s3.running() as server:
    print(server.endpoint, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        host, _, port = process.stdout.readline().strip().removeprefix("http://").partition(":")
        socket.create_connection((host, int(port)), timeout=10).close()
        process.kill()
        process.wait()
    ended = time.monotonic() + 30
    while time.monotonic() < ended:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the server still runs")
