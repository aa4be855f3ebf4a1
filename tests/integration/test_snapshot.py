"""A snapshot of any store starts any other, and generations exist as long as something refers to them."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from udddm.errors import StoreError
from udddm.order import Order
from udddm.store import Encoding, Snapshot, X0Store
from udddm.store.device import DeviceStore
from udddm.store.encoding import StateDtype
from udddm.store.layout import StateLayout
from udddm.store.pinned import MemoryTable, PinnedStore
from udddm.store.zarr import ZarrStore
from udddm.testing.store import Make, ModelledRun

CPU = torch.device("cpu")
ORDER = Order(seed=2, samples=61, batch_size=8, num_lanes=4, chunk_size=3, chunks_per_window=2)  # 8 steps per epoch


def gpu(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
    return DeviceStore(StateLayout(order, lanes, shape, encoding, CPU))


def pinned(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
    return PinnedStore(
        StateLayout(order, lanes, shape, encoding, CPU), MemoryTable(StateLayout(order, lanes, shape, encoding, CPU))
    )


def zarr(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
    return ZarrStore(StateLayout(order, lanes, shape, encoding, CPU), directory / "state", default=True)


def zarr_elsewhere(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
    return ZarrStore(StateLayout(order, lanes, shape, encoding, CPU), directory / "elsewhere", default=False)


KINDS: dict[str, Make] = {"gpu": gpu, "pinned": pinned, "zarr": zarr, "zarr elsewhere": zarr_elsewhere}


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory if there is such a file system, because a synced write to disk takes milliseconds."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(KINDS, KINDS)))
def test_a_snapshot_at_any_step_starts_any_store(quick: Path, old: str, new: str) -> None:
    for position, world in (
        (0, 1),
        (3, 2),
        (ORDER.steps_per_epoch, 4),
        (ORDER.steps_per_epoch + 5, 1),
        (3 * ORDER.steps_per_epoch - 1, 2),
    ):
        run = ModelledRun(KINDS[old], ORDER, Encoding("fp16"), quick / str(position))
        run.start(world)
        run.advance(position)
        saved = run.save()
        run.make = KINDS[new]
        run.restart(saved, 4 // world)
        run.check_rows()
        run.advance(2)
        run.restart(run.save(), world)  # and again from what the new store wrote
        run.check_rows()
        run.advance(ORDER.steps_per_epoch)
        run.check_rows()
        run.crash()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(["fp32", "fp16", "bf16", "uint8"]),
    lives=st.lists(
        st.tuples(st.sampled_from(list(KINDS)), st.integers(0, 20), st.sampled_from([1, 2, 4])), min_size=2, max_size=6
    ),
)
def test_a_run_may_change_its_store_at_every_start(dtype: StateDtype, lives: list[tuple[str, int, int]]) -> None:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        run = ModelledRun(KINDS[lives[0][0]], ORDER, Encoding(dtype), Path(name))
        run.start()
        for kind, steps, world in lives:
            saved = run.save()
            run.make = KINDS[kind]
            run.restart(saved, world)
            run.check_rows()
            run.advance(steps)
        run.check_rows()
        run.crash()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["fp32", "uint8"])
def test_a_start_may_change_the_dtype(quick: Path, kind: str, target: StateDtype) -> None:
    run = ModelledRun(KINDS[kind], ORDER, Encoding("fp16"), quick)
    run.start()
    run.advance(ORDER.steps_per_epoch + 3)
    saved = run.save()
    old, new = run.encoding, Encoding(target)
    run.encoding, run.make = new, zarr_elsewhere if kind == "zarr" else zarr
    saved.model = {i: new.recode(row, old) for i, row in saved.model.items()}
    run.restart(saved, 2)
    run.check_rows()
    run.advance(ORDER.steps_per_epoch)
    run.check_rows()
    run.crash()


def test_a_store_with_another_dtype_at_the_same_location_is_refused_and_unchanged(quick: Path) -> None:
    run = ModelledRun(zarr, ORDER, Encoding("fp16"), quick)
    run.start()
    run.advance(ORDER.steps_per_epoch + 3)
    saved = run.save()
    run.encoding = Encoding("fp32")
    with pytest.raises(StoreError, match=r"differs in dtype.*store\.url"):
        run.restart(saved)
    run.encoding = Encoding("fp16")
    run.restart(saved)
    run.check_rows()
    run.crash()


def test_a_different_spelling_of_the_location_keeps_the_state(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quick)

    def relative(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        return ZarrStore(StateLayout(order, lanes, shape, encoding, CPU), "elsewhere", default=False)

    run = ModelledRun(zarr_elsewhere, ORDER, Encoding("fp16"), quick)
    run.start()
    for make in (relative, zarr_elsewhere, relative):
        run.advance(ORDER.steps_per_epoch + 3)
        run.make = make
        run.restart(run.save())
        run.check_rows()
    run.crash()


def generations(run: ModelledRun) -> list[int]:
    return sorted(int(p.name[4:]) for p in (run.directory / "state").glob("gen-*"))


def settle(run: ModelledRun) -> None:
    """Wait for all writes, and delete the generations that were being written during the last cleanup."""
    stores = cast("list[ZarrStore]", run.stores)
    for store in stores:
        store.settle()
    for store in stores:
        store.retain(store._table.retained)
        store.settle()


@pytest.mark.parametrize("world", [1, 4])
def test_generations_of_retained_snapshots_are_kept_and_others_deleted(quick: Path, world: int) -> None:
    run = ModelledRun(zarr, ORDER, Encoding("fp16"), quick)
    run.start(world)
    run.advance(2 * ORDER.steps_per_epoch + 1)
    run.save()  # refers to generation 2 and parts of 3
    run.advance(5 * ORDER.steps_per_epoch)
    settle(run)
    assert set(generations(run)) <= {2, 3, 7, 8}
    assert {2, 3, 7} <= set(generations(run))
    run.save()
    run.advance(3 * ORDER.steps_per_epoch)
    settle(run)
    assert {2, 3, 7, 8, 10} <= set(generations(run)) <= {2, 3, 7, 8, 10, 11}
    run.save()  # drops the snapshot of generation 2
    run.advance(2 * ORDER.steps_per_epoch)
    settle(run)
    assert {7, 8, 10, 11, 12} <= set(generations(run)) <= {7, 8, 10, 11, 12, 13}
    run.restart(run.kept[0])
    run.check_rows()
    settle(run)
    assert generations(run) == [7, 8]
    run.crash()


def test_a_retained_snapshot_never_reads_generations_overwritten_by_another_start(quick: Path) -> None:
    """zarr, then gpu, then zarr again within one epoch: the first snapshot's generation has been overwritten."""
    run = ModelledRun(zarr, ORDER, Encoding("fp16"), quick)
    run.start()
    run.advance(ORDER.steps_per_epoch + 2)
    first = run.save()
    run.make = gpu
    run.restart(first)
    run.advance(2)
    second = run.save()
    run.make = zarr
    run.restart(second)
    run.check_rows()
    with pytest.raises(StoreError, match=r"generation 1, lane 0.*is not the one that the checkpoint"):
        run.restart(first)
    run.restart(second)
    run.check_rows()
    run.crash()


def test_a_damaged_header_is_an_error_that_names_the_file(quick: Path) -> None:
    run = ModelledRun(gpu, ORDER, Encoding("fp16"), quick)
    run.start()
    saved = run.save()
    (saved.directory / "snapshot.json").write_text("{")
    with pytest.raises(StoreError, match=str(saved.directory)):
        Snapshot(saved.directory, quick / "state")
    shutil.rmtree(saved.directory)
    with pytest.raises(StoreError, match=str(saved.directory)):
        Snapshot(saved.directory, quick / "state")
