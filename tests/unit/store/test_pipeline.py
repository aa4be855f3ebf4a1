"""The pipeline under failures and delays: it stops at once, never hangs, and stays within its windows."""

import errno
import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from udddm.errors import StoreError
from udddm.order import Order
from udddm.storage.base import Retry
from udddm.storage.local import LocalObjectStore
from udddm.store import Encoding, X0Store
from udddm.store.autotune import Limits
from udddm.store.layout import StateLayout
from udddm.store.pinned import MemoryTable, PinnedStore
from udddm.store.pipeline import HostStore, _Window
from udddm.store.zarr import ZarrStore
from udddm.testing.store import SHAPE, ModelledRun

CPU = torch.device("cpu")
ROW_BYTES = 24  # of SHAPE in fp16
ORDER = Order(
    seed=9, samples=90, batch_size=8, num_lanes=2, chunk_size=4, chunks_per_window=2
)  # 6 windows per lane, 12 steps per epoch
ONE_WINDOW = Order(seed=9, samples=40, batch_size=8, num_lanes=2, chunk_size=4, chunks_per_window=8)


def test_a_store_on_cuda_without_an_index_uses_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device`, which the threads of a store call, refuses a device without an index."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for given, used in (("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        layout = StateLayout(ORDER, range(2), SHAPE, Encoding("fp16"), torch.device(given))
        store = PinnedStore.__new__(PinnedStore)
        X0Store.__init__(store, layout)  # alone: the rest needs a GPU
        assert store.device == torch.device(used)


class Watched(LocalObjectStore):
    """Local files with a callback before each access of a key: `before("get" or "put", key)`."""

    def __init__(self, root: Path, before: Callable[[str, str], None]):
        super().__init__(root)
        self.before = before
        self.log: list[tuple[str, str, float, float]] = []

    def _get(self, key: str) -> bytes:
        began = time.monotonic()
        self.before("get", key)
        data = super()._get(key)
        self.log.append(("get", key, began, time.monotonic()))
        return data

    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None:
        began = time.monotonic()
        self.before("put", key)
        super()._put(key, parts)
        self.log.append(("put", key, began, time.monotonic()))

    def chunks(self, operation: str) -> Counter[str]:
        return Counter(key for what, key, _, _ in self.log if what == operation and "/c/" in key)


def least_memory(order: Order, prefetch: int = 1) -> int:
    """The fewest bytes with which a rank of all lanes can run. With more windows, a small state is never read back."""
    smallest = min(order.smallest_window(lane) for lane in range(order.num_lanes))
    largest = min(order.chunks_per_window * order.chunk_size, order.longest_lane)
    windows = 2 + -(-order.samples_per_lane_step // smallest)
    return ROW_BYTES * order.num_lanes * (windows * largest + 2 * prefetch * order.samples_per_lane_step)


class WatchedRun(ModelledRun):
    """A run on zarr stores with watched object stores, with the least memory unless `options` set it."""

    def __init__(self, directory: Path, before: Callable[[str, str], None], order: Order = ORDER, **options: int):
        super().__init__(self._store, order, Encoding("fp16"), directory)
        self.objects = Watched(directory / "state", before)
        self.options = {"memory": least_memory(order, options.get("prefetch", 1)), **options}

    def _store(
        self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path
    ) -> ZarrStore:
        store = ZarrStore(
            StateLayout(order, lanes, shape, encoding, CPU),
            directory / "state",
            default=True,
            limits=Limits(**self.options),
        )
        store._table.generations.objects = self.objects
        return store


def nothing(operation: str, key: str) -> None:
    return


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalObjectStore, "retry", Retry(first_pause=0.001))


def closes_promptly(store: HostStore, seconds: float = 2) -> None:
    closer = threading.Thread(target=store.close, daemon=True)
    closer.start()
    closer.join(seconds)
    assert not closer.is_alive(), "close hangs"
    assert not [t for t in store._threads if t.is_alive()]


FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError("anything else"),
    MemoryError("no memory"),
]


@pytest.mark.parametrize("operation", ["get", "put"])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: type(f).__name__ + str(getattr(f, "errno", "")))
def test_a_background_failure_stops_the_next_step(tmp_path: Path, operation: str, failure: BaseException) -> None:
    failed: list[float] = []

    def before(what: str, key: str) -> None:
        if what == operation and "gen-000002/c/" in key:
            failed.append(time.monotonic())
            raise failure

    run = WatchedRun(tmp_path, before)
    run.start()
    with pytest.raises(StoreError) as caught:
        run.advance(4 * ORDER.steps_per_epoch)
    assert time.monotonic() - failed[0] < 2
    assert str(failure) in str(caught.value)
    if isinstance(failure, OSError):
        assert "Checkpoints are intact" in str(caught.value)
        assert "gen-000002" in str(caught.value)
    store = run.stores[0]
    assert isinstance(store, ZarrStore)
    for again in (store.read, store.settle, lambda: store.rows(0, 0), lambda: store.snapshot(tmp_path / "s")):
        with pytest.raises(StoreError):
            again()
    with pytest.raises(StoreError):
        store.write(torch.zeros(8, *SHAPE))
    closes_promptly(store)


@pytest.mark.parametrize("method", ["load", "save", "finish", "discard_before"])
def test_a_failing_table_stops_the_next_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> PinnedStore:
        table = MemoryTable(StateLayout(order, lanes, shape, encoding, CPU))

        def fails(*arguments: Any) -> Any:
            raise RuntimeError(f"{method} broke")

        monkeypatch.setattr(table, method, fails)
        return PinnedStore(StateLayout(order, lanes, shape, encoding, CPU), table)

    run = ModelledRun(make, ORDER, Encoding("fp32"), Path())
    run.start()
    with pytest.raises(StoreError, match=f"the x0-state pipeline failed.*{method} broke"):
        run.advance(3 * ORDER.steps_per_epoch)
    closes_promptly(run.stores[0])  # type: ignore[arg-type]


def test_a_snapshot_that_waits_for_a_failing_write_does_not_hang(tmp_path: Path) -> None:
    def before(what: str, key: str) -> None:
        if what == "put" and "/c/" in key:
            time.sleep(0.1)
            raise OSError(errno.ENOSPC, "No space left on device")

    run = WatchedRun(tmp_path, before)
    run.start()
    run.advance(2)  # the first window of each lane is visited
    with pytest.raises(StoreError, match="No space left"):
        run.save()
    closes_promptly(run.stores[0])  # type: ignore[arg-type]


def test_transient_errors_are_retried_and_counted(tmp_path: Path) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()

    def before(what: str, key: str) -> None:
        if "/c/" not in key:
            return
        with lock:
            seen[what, key] += 1
            first = seen[what, key] <= 2
        if first:
            raise OSError(errno.EIO, "Input/output error")

    run = WatchedRun(tmp_path, before, threads=1)
    run.start()
    run.advance(3 * ORDER.steps_per_epoch)
    run.check_rows()
    run.save()
    assert run.stores[0].counters.retries == run.objects.retries > 2 * sum(run.objects.chunks("put").values())
    run.restart(run.kept[-1])
    run.check_rows()
    run.crash()


@pytest.mark.parametrize("seed", range(3))
def test_delays_anywhere_change_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)

    def before(what: str, key: str) -> None:
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.02)

    for order in (ORDER, ONE_WINDOW, Order(seed, 53, 22, 2, 2, 1)):
        run = WatchedRun(tmp_path / str(order.samples), before, order, prefetch=1 + seed, threads=1 + seed)
        run.start()
        for steps in (order.steps_per_epoch, 2, 3 * order.steps_per_epoch):
            run.advance(steps)
            run.restart(run.save())
            run.check_rows()
        run.crash()


def test_completion_records_slower_than_an_epoch_change_nothing(tmp_path: Path) -> None:
    def before(what: str, key: str) -> None:
        if "complete/lane" in key and what == "put":
            time.sleep(0.1)

    run = WatchedRun(tmp_path, before, Order(1, 8, 4, 2, 2, 2), threads=3)
    run.start()
    run.advance(8 * run.order.steps_per_epoch)
    run.save()
    run.check_rows()
    run.advance(1)
    run.stores[0].settle()  # type: ignore[attr-defined]
    left = sorted(p.name for p in (tmp_path / "state").iterdir() if p.name != "zarr.json")
    assert left == ["gen-000008"]
    run.crash()


def test_reads_and_writes_of_an_epoch_never_touch_the_same_object(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path, nothing)
    run.start()
    run.advance(4 * ORDER.steps_per_epoch)
    run.stores[0].settle()  # type: ignore[attr-defined]
    run.crash()
    total = 4 * sum(ORDER.num_chunks(lane) for lane in range(2))
    puts, gets = run.objects.chunks("put"), run.objects.chunks("get")
    assert len(puts) == total
    assert set(puts.values()) == {1}  # each chunk of each generation is written once
    assert set(gets.values()) == {1}  # and read at most once
    written = {key: past for what, key, _, past in run.objects.log if what == "put"}
    for what, key, began, _ in run.objects.log:
        if what == "get" and "/c/" in key:
            assert began >= written[key], "read while being written"


def test_the_next_epoch_is_passed_on_in_memory_if_needed_immediately(tmp_path: Path) -> None:
    whole = WatchedRun(tmp_path / "one", nothing, ONE_WINDOW)
    whole.start()
    whole.advance(4 * ONE_WINDOW.steps_per_epoch)
    whole.crash()
    assert not whole.objects.chunks("get")  # each epoch's only window needs the previous one's rows immediately
    many = WatchedRun(tmp_path / "many", nothing)
    many.start()
    many.advance(4 * ORDER.steps_per_epoch)
    many.crash()
    assert 0 < sum(many.objects.chunks("get").values()) < sum(many.objects.chunks("put").values())


def test_the_first_window_of_an_epoch_is_read_before_the_previous_one_ends(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path, nothing, prefetch=1)
    run.start()
    run.advance(2 * ORDER.steps_per_epoch - 1)
    store = run.stores[0]
    assert isinstance(store, ZarrStore)
    deadline = time.monotonic() + 5
    while not all((2, lane, 0) in store._windows for lane in store.lanes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert store.epoch == 1
    run.crash()


class CountedStore(PinnedStore):
    """Counts the windows of each lane: those registered in the pipeline, and those whose rows are in memory."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.alive: Counter[int] = Counter()
        self.most = self.most_alive = 0

    def _new_window(self, epoch: int, lane: int, index: int) -> _Window:
        window = super()._new_window(epoch, lane, index)
        self.alive[lane] += 1
        self.most = max(self.most, 1 + sum(1 for key in self._windows if key[1] == lane))
        self.most_alive = max(self.most_alive, self.alive[lane])
        weakref.finalize(window.buffer, self._gone, lane)
        return window

    def _gone(self, lane: int) -> None:
        self.alive[lane] -= 1


@pytest.mark.parametrize("windows", [3, 5])
@pytest.mark.parametrize("samples", [64, 400, 2000])
def test_memory_is_bounded_by_the_windows_that_fit_for_any_number_of_samples(samples: int, windows: int) -> None:
    memory = windows * 2 * 8 * ROW_BYTES + 2 * 16 * ROW_BYTES  # two lanes, 8 samples per window; one batch each way

    def make(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> CountedStore:
        return CountedStore(
            StateLayout(order, lanes, shape, encoding, CPU),
            MemoryTable(StateLayout(order, lanes, shape, encoding, CPU)),
            limits=Limits(memory=memory),
        )

    gc.collect()
    run = ModelledRun(make, Order(1, samples, 16, 2, 4, 2), Encoding("fp16"), Path())
    run.start()
    run.advance(2 * run.order.steps_per_epoch + 3)
    store = run.stores[0]
    assert isinstance(store, CountedStore)
    assert 3 <= store.most <= windows
    assert store.most_alive <= windows + 1  # one for the moment in which the task that wrote it returns
    run.crash()
    gc.collect()
    assert sum(store.alive.values()) <= 2 * windows


def test_a_step_over_many_windows_keeps_those_and_two_more_in_memory() -> None:
    order = Order(1, 300, 60, 2, 3, 2)  # 30 samples per step and lane, 6 per window
    store = PinnedStore(
        StateLayout(order, range(2), SHAPE, Encoding("fp16"), CPU),
        MemoryTable(StateLayout(order, range(2), SHAPE, Encoding("fp16"), CPU)),
    )
    assert store.pace.windows == 7
    store.close()
    run = ModelledRun(
        lambda o, lanes, shape, e, d: PinnedStore(
            StateLayout(o, lanes, shape, e, CPU), MemoryTable(StateLayout(o, lanes, shape, e, CPU))
        ),
        order,
        Encoding("fp16"),
        Path(),
    )
    run.start()
    run.advance(3 * order.steps_per_epoch)
    run.crash()


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_store_waiting_for_a_slow_disk_closes_when_the_disk_answers(tmp_path: Path, steps: int) -> None:
    def before(what: str, key: str) -> None:
        if "/c/" in key:
            time.sleep(0.3)

    run = WatchedRun(tmp_path, before)
    run.start()
    run.advance(steps)
    closes_promptly(run.stores[0])  # type: ignore[arg-type]


def test_a_closed_store_raises_instead_of_waiting(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path, nothing)
    run.start()
    run.advance(1)
    store = run.stores[0]
    run.crash()
    with pytest.raises(StoreError, match="closed"):
        store.read()
    with pytest.raises(StoreError, match="closed"):
        store.write(torch.zeros(8, *SHAPE))
    with pytest.raises(StoreError, match="closed"):
        store.rows(0, 0)


def test_the_generations_of_a_chunk_are_saved_in_order_even_if_one_is_slow() -> None:
    """The next epoch gets its rows immediately and may end before they are saved. In memory, both are saved to the same
    array."""

    saved: list[tuple[int, int, int]] = []

    class Slow(MemoryTable):
        def save(self, generation: int, lane: int, chunk: int, rows: Any) -> None:
            if generation == 1:
                time.sleep(0.2)
            super().save(generation, lane, chunk, rows)
            saved.append((lane, chunk, generation))

    order, encoding = ONE_WINDOW, Encoding("fp32")
    layout = StateLayout(order, range(order.num_lanes), SHAPE, encoding, CPU)
    table = Slow(layout)
    store = PinnedStore(layout, table, Limits(threads=16))
    store.start(0, 0, None)
    try:
        for _ in range(3 * order.steps_per_epoch):
            store.write(store.read() + 1)
        store.settle()
        assert sorted(saved) == sorted(saved, key=lambda entry: entry[:2])
        zero = MemoryTable(layout)
        zero.open(0, 0, None)
        for lane in range(order.num_lanes):
            for chunk in range(order.num_chunks(lane)):
                expected = torch.from_numpy(zero.load(0, lane, chunk)) + 1 + 1 + 1
                assert torch.equal(torch.from_numpy(store.rows(lane, chunk)), expected)
    finally:
        store.close()
