"""A store that was moved or copied together with its run, or has another name, is still the store of the run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import udddm
from udddm.errors import CorruptChunkError, StoreError
from udddm.training.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
    "order": {"lanes": 1, "chunk": 16, "window": 1},
    "train": {"steps": 13, "batch_size": 8, "ema": [0.9]},
    "checkpoint": {"every_steps": 10},
    "sample": {"every_steps": 0, "final": 0},
}


IMAGES = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 1, 8, 8)


def train(run: Path, store: Path) -> Any:
    result = udddm.train(
        SETTINGS, IMAGES, run_dir=run, device="cpu", overrides={"store.kind": "zarr", "store.url": str(store)}
    )
    return result.weights_sha256, result.ema_sha256, result.state_sha256


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory if there is such a file system, because a synced write to disk takes milliseconds."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    result = udddm.train(SETTINGS, IMAGES, run_dir="memory://moved/undisturbed", device="cpu")
    return result.weights_sha256, result.ema_sha256, result.state_sha256


@pytest.fixture
def interrupted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run and its store, of which the newest checkpoint is from the middle of the second epoch."""
    save = Trainer.save

    def failing(trainer: Trainer) -> Path:
        save(trainer)
        raise RuntimeError("the power fails")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", failing)
        with pytest.raises(RuntimeError, match="the power fails"):
            train(place / "old" / "run", place / "old" / "state")
    return place / "old"


def files(store: Path) -> set[str]:
    return {str(p.relative_to(store)) for p in store.rglob("*") if p.is_file() and "lease" not in p.name}


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_run_continues_on_its_moved_store(how: str, interrupted: Path, undisturbed: Any, place: Path) -> None:
    new = place / "new"
    if how == "copied":
        shutil.copytree(interrupted, new)
        before = files(interrupted / "state")
    else:
        interrupted.rename(new)
    assert train(new / "run", new / "state") == undisturbed
    if how == "copied":
        assert files(interrupted / "state") == before


def test_a_store_that_was_moved_away_is_missed_before_anything_is_created(
    interrupted: Path, undisturbed: Any, place: Path
) -> None:
    before = files(interrupted / "run")
    (interrupted / "state").rename(place / "moved")
    with pytest.raises(StoreError, match=r"refers to the x0-state at .*old/state.*give its new location"):
        train(interrupted / "run", interrupted / "state")
    assert files(interrupted / "run") == before
    assert not [path for path in (interrupted / "state").rglob("*") if path.is_file()]
    assert train(interrupted / "run", place / "moved") == undisturbed


def test_another_runs_store_at_the_recorded_location_is_refused(
    interrupted: Path, undisturbed: Any, place: Path
) -> None:
    """Even if it is the state of the same configuration and data."""
    state = interrupted / "state"
    state.rename(place / "moved")
    train(place / "other", state)
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match="holds the x0-state of another run"):
        train(interrupted / "run", state)
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before
    assert train(interrupted / "run", place / "moved") == undisturbed


def test_a_missing_chunk_is_reported_before_training(
    interrupted: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    """It is one of the next generation, which would only be read an epoch later."""
    written = json.loads(next((interrupted / "run").glob("checkpoints/step-*/state/lane-0000.json")).read_text())
    generation = max(path.name for path in (interrupted / "state").glob("gen-*"))
    chunk = interrupted / "state" / generation / "c" / "0" / next(iter(written["written"])) / "0" / "0" / "0"
    chunk.rename(place / "kept")
    with monkeypatch.context() as patch, pytest.raises(CorruptChunkError, match=f"chunk .* missing .*{chunk}"):
        patch.setattr(Trainer, "train_step", None)
        train(interrupted / "run", interrupted / "state")
    (place / "kept").rename(chunk)
    assert train(interrupted / "run", interrupted / "state") == undisturbed


def test_a_run_whose_store_is_missing_is_refused_and_nothing_is_deleted(
    interrupted: Path, undisturbed: Any, place: Path
) -> None:
    """The new location holds the generations of an earlier part of the run."""
    moved, wrong = place / "moved", place / "wrong"
    shutil.copytree(interrupted / "state", wrong)
    for record in wrong.glob("gen-*/complete/*"):
        record.unlink()
    (interrupted / "state").rename(moved)
    before = files(wrong)
    with pytest.raises(StoreError, match=r"refers to the x0-state at .*old/state, and .*wrong does not hold it"):
        train(interrupted / "run", wrong)
    assert files(wrong) == before
    assert train(interrupted / "run", moved) == undisturbed
