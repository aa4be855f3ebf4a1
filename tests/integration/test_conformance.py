"""All stores pass the conformance suite that ships in the package, the zarr store also compressed and on S3."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from udddm.order import Order
from udddm.storage import open_object_store
from udddm.storage.base import ObjectStore, Retry
from udddm.store import Encoding, X0Store
from udddm.store.autotune import Limits
from udddm.store.device import DeviceStore
from udddm.store.layout import StateLayout
from udddm.store.pinned import MemoryTable, PinnedStore
from udddm.store.zarr import ZarrStore
from udddm.testing.objects import DelayedObjectStore, FaultyObjectStore, Operation
from udddm.testing.s3 import BUCKET, S3Server
from udddm.testing.store import ORDERS, ModelledRun, StoreConformance

T = TypeVar("T")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class InMemoryFiles(StoreConformance):
    """Uses files in memory if there is such a file system, because a synced write to disk takes milliseconds."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[Path]:
        shared = Path("/dev/shm")
        if not shared.is_dir():
            yield tmp_path
            return
        directory = Path(tempfile.mkdtemp(prefix="udddm-test-", dir=shared))
        yield directory
        shutil.rmtree(directory)


class TestDeviceStore(InMemoryFiles):
    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        return DeviceStore(StateLayout(order, lanes, shape, encoding, DEVICE))


class TestPinnedStore(InMemoryFiles):
    dtypes = ("fp32", "uint8")
    examples = 8

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        table = MemoryTable(StateLayout(order, lanes, shape, encoding, DEVICE))
        return PinnedStore(StateLayout(order, lanes, shape, encoding, DEVICE), table)


@pytest.mark.slow
class TestPinnedStoreFully(TestPinnedStore):
    dtypes = StoreConformance.dtypes
    examples = StoreConformance.examples


class TestZarrStore(InMemoryFiles):
    examples = 8

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        return ZarrStore(StateLayout(order, lanes, shape, encoding, DEVICE), directory / "state", default=True)


@pytest.mark.slow
class TestZarrStoreFully(TestZarrStore):
    examples = StoreConformance.examples


class TestCompressedStore(InMemoryFiles):
    dtypes = ("fp16", "uint8")
    examples = 5

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        layout = StateLayout(order, lanes, shape, encoding, DEVICE)
        return ZarrStore(layout, directory / "state", default=True, compression="zstd")


class TestZarrStoreWithOneThread(TestZarrStore):
    """The minimum for the pipeline: one thread for reads, one for writes, one step ahead."""

    dtypes = ("fp16",)

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        url = directory / "state"
        return ZarrStore(
            StateLayout(order, lanes, shape, encoding, DEVICE), url, default=False, limits=Limits(threads=1, prefetch=1)
        )


class TestZarrStoreOnS3(InMemoryFiles):
    dtypes = ("fp16",)
    examples = 5

    @pytest.fixture(autouse=True)
    def server(self, s3: S3Server) -> None:
        """Set the environment for the S3 server."""

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        url = f"s3://{BUCKET}{directory}"
        return ZarrStore(StateLayout(order, lanes, shape, encoding, DEVICE), url, default=False)


@pytest.mark.slow
class TestZarrStoreOnS3Fully(TestZarrStoreOnS3):
    dtypes = StoreConformance.dtypes
    examples = StoreConformance.examples


class FlakyObjects(FaultyObjectStore):
    """Every seventh request fails, alternately before and after taking effect."""

    def __init__(self, inner: ObjectStore):
        super().__init__(inner)
        self._places = itertools.cycle(range(14))

    def _request(self, operation: Operation, key: str, sent: int, action: Callable[[], T]) -> T:
        place = next(self._places)
        if place in (6, 13):
            self.fail(ConnectionResetError("reset on purpose"), operation=operation, after=place == 13)
        return super()._request(operation, key, sent, action)


class TestZarrStoreOnSlowAndFlakyObjects(InMemoryFiles):
    dtypes = ("fp16",)

    @pytest.fixture(autouse=True)
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> list[FlakyObjects]:
        """All object stores that the stores of the test have opened."""
        found: list[FlakyObjects] = []

        def open_wrapped(url: str | Path) -> ObjectStore:
            inner = open_object_store(url)
            inner.retry = Retry(attempts=10, first_pause=0.001, longest_pause=0.004)
            found.append(FlakyObjects(DelayedObjectStore(inner, 0.001)))
            return found[-1]

        monkeypatch.setattr("udddm.store.zarr.open_object_store", open_wrapped)
        return found

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        return ZarrStore(StateLayout(order, lanes, shape, encoding, DEVICE), directory / "state", default=False)

    def test_what_was_cured_is_counted(self, opened: list[FlakyObjects], directory: Path) -> None:
        run = ModelledRun(self.make, ORDERS["even"], Encoding("fp16"), directory)
        run.start()
        try:
            run.advance(2 * run.order.steps_per_epoch)
            run.check_rows()
            run.advance()  # updates the count of retries
            state, _ = opened
            assert 0 < run.stores[0].counters.retries <= state.failed  # prefetching is retried concurrently
        finally:
            run.crash()
