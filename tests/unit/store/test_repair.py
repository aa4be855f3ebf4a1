"""Corruption stops a run, or with `reinitialize` resets exactly the corrupt samples; lost records are rebuilt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from udddm.config import StoreConfig
from udddm.errors import CorruptChunkError, StoreError
from udddm.order import Order
from udddm.runs.run import Run
from udddm.storage.local import LocalObjectStore
from udddm.store import Encoding, X0Store, build
from udddm.store.encoding import generation_zero
from udddm.store.generations import Generations, open_existing
from udddm.store.layout import StateLayout
from udddm.testing.store import SHAPE, ModelledRun

ORDER = Order(seed=5, samples=61, batch_size=8, num_lanes=2, chunk_size=4, chunks_per_window=2)
FP16 = Encoding("fp16")


def run_at(directory: Path, on_corruption: str, kind: str = "zarr") -> ModelledRun:
    config = StoreConfig.model_validate({"kind": kind, "on_corruption": on_corruption})

    def make(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, where: Path) -> X0Store:
        return build(
            Run(where).store_context(
                StateLayout(order, lanes, shape, Encoding(config.dtype), torch.device("cpu")), config
            )
        )

    return ModelledRun(make, ORDER, FP16, directory)


def chunk_path(directory: Path, generation: int, lane: int, chunk: int) -> Path:
    return (
        directory
        / "state"
        / Generations(LocalObjectStore(directory), ORDER, SHAPE, FP16).chunk_key(generation, lane, chunk)
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("steps", [0, 3])
def test_reinitialize_resets_only_the_corrupt_chunk_to_generation_zero(
    tmp_path: Path, damage: Callable[[Path], None], steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_at(tmp_path, "reinitialize")
    run.start()
    run.advance(ORDER.steps_per_epoch + steps)
    saved = run.save()
    run.crash()
    index = ORDER.num_windows(1) - 1  # a window without visited samples
    chunk = ORDER.window_chunks_of(1, 1, index)[0]
    damage(chunk_path(tmp_path, 1, 1, chunk))
    samples = ORDER.chunk_samples(1, chunk)
    zero = FP16.to_array(generation_zero(ORDER.seed, samples, SHAPE, FP16))
    saved.model.update((int(sample), zero[i]) for i, sample in enumerate(samples))
    for _ in range(2):  # and again from the same checkpoint
        run.restart(saved)
        run.check_rows()
        run.advance(2 * ORDER.steps_per_epoch)  # every read is compared with the model
        run.check_rows()
        assert run.stores[0].counters.reinitialized == len(samples)
        run.crash()
    said = caplog.text
    assert f"generation 1, lane 1, chunk {chunk}" in said and f"{len(samples)} samples" in said


@pytest.mark.parametrize("kind", ["gpu", "pinned"])
def test_a_memory_store_started_from_a_corrupt_zarr_store_repairs_it_too(tmp_path: Path, kind: str) -> None:
    run = run_at(tmp_path, "stop")
    run.start()
    run.advance(ORDER.steps_per_epoch + 1)
    saved = run.save()
    run.crash()
    chunk = ORDER.window_chunks_of(0, 1, ORDER.num_windows(0) - 1)[0]
    flip(chunk_path(tmp_path, 1, 0, chunk))
    refused = run_at(tmp_path, "stop", kind)
    with pytest.raises(CorruptChunkError, match="--on-corruption"):
        refused.start(1, saved)
    refused.crash()
    samples = ORDER.chunk_samples(0, chunk)
    zero = FP16.to_array(generation_zero(ORDER.seed, samples, SHAPE, FP16))
    saved.model.update((int(sample), zero[i]) for i, sample in enumerate(samples))
    taken = run_at(tmp_path, "reinitialize", kind)
    taken.start(1, saved)
    taken.advance(ORDER.steps_per_epoch)
    assert taken.stores[0].counters.reinitialized == len(samples)
    taken.crash()


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_lost_completion_record_is_rebuilt_from_the_chunks(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = run_at(tmp_path, "stop")
    run.start()
    run.advance(ORDER.steps_per_epoch + 2)
    saved = run.save()
    run.crash()
    record = tmp_path / "state" / "gen-000001" / "complete" / "lane-0001.json"
    before = json.loads(record.read_text())
    damage(record)
    run.restart(saved)
    assert json.loads(record.read_text()) == before
    run.advance(2 * ORDER.steps_per_epoch)
    run.crash()


def test_a_lost_record_of_changed_chunks_is_an_error(tmp_path: Path) -> None:
    run = run_at(tmp_path, "reinitialize")
    run.start()
    run.advance(ORDER.steps_per_epoch + 2)
    saved = run.save()
    run.crash()
    (tmp_path / "state" / "gen-000001" / "complete" / "lane-0001.json").unlink()
    one, other = (chunk_path(tmp_path, 1, 1, chunk) for chunk in (0, 1))
    kept = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(kept)
    with pytest.raises(StoreError, match="lane 1 is not complete"):
        run.restart(saved)
    run.crash()


def test_a_later_run_at_the_same_url_is_refused_but_the_same_run_resumes(tmp_path: Path) -> None:
    url = tmp_path / "shared"

    def opened(run_id: str) -> ModelledRun:
        directory = tmp_path / run_id
        directory.mkdir(exist_ok=True)
        (directory / "run.json").write_text(json.dumps({"id": run_id, "config": {}}))
        config = StoreConfig(kind="zarr", url=str(url))

        def make(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, where: Path) -> X0Store:
            return build(
                Run(where).store_context(
                    StateLayout(order, lanes, shape, Encoding(config.dtype), torch.device("cpu")), config
                )
            )

        return ModelledRun(make, ORDER, FP16, directory)

    first = opened("first")
    first.start()
    first.advance(ORDER.steps_per_epoch + 1)
    saved = first.save()
    first.crash()
    before = {p: p.read_bytes() for p in url.rglob("*") if p.is_file()}
    second = opened("second")
    with pytest.raises(StoreError, match=r"another run \(first\)"):
        second.start()
    second.crash()
    assert {p: p.read_bytes() for p in url.rglob("*") if p.is_file()} == before
    first.restart(saved)
    first.advance(ORDER.steps_per_epoch)
    first.crash()
    assert open_existing(LocalObjectStore(url)).order.samples == ORDER.samples


def test_generations_without_an_owner_are_not_overwritten(tmp_path: Path) -> None:
    stored = Generations(LocalObjectStore(tmp_path), ORDER, SHAPE, FP16)
    stored.create()
    stored.create("mine")  # nothing in it yet
    assert json.loads((tmp_path / "zarr.json").read_text())["attributes"]["run"] == "mine"
    (tmp_path / "zarr.json").unlink()
    stored.create()
    stored.begin(1)
    with pytest.raises(StoreError, match="id not recorded"):
        stored.create("mine")
