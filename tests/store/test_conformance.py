"""The three stores pass the conformance suite that ships in the package."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from udddm.order import Order
from udddm.store import Encoding, X0Store
from udddm.store.device import DeviceStore
from udddm.store.pinned import MemoryTable, PinnedStore
from udddm.store.zarr import ZarrStore
from udddm.testing.store import StoreConformance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class InMemoryFiles(StoreConformance):
    """Files in memory where there is such a file system: a synced write costs milliseconds on a disk."""

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
        return DeviceStore(order, lanes, shape, encoding, DEVICE)


class TestPinnedStore(InMemoryFiles):
    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        table = MemoryTable(order, lanes, shape, encoding)
        return PinnedStore(order, lanes, shape, encoding, DEVICE, table)


class TestZarrStore(InMemoryFiles):
    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        return ZarrStore(order, lanes, shape, encoding, DEVICE, directory / "state", default=True)


class TestZarrStoreWithOneThread(TestZarrStore):
    """The least that the pipeline may have: one thread for reads, one for writes, one step ahead."""

    dtypes = ("fp16",)

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        url = directory / "state"
        return ZarrStore(order, lanes, shape, encoding, DEVICE, url, default=False, threads=1, prefetch=1)
