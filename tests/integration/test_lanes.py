"""The lanes of a run whose configuration leaves them open: chosen from the data set, and kept by the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import udddm
from udddm.backends.launchers.base import Job, Launcher, supervise
from udddm.config import RunConfig, resolve
from udddm.errors import ConfigError, LanesError

SHAPE = (3, 2, 2)


class Images:
    """Images of one color each."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return np.full(SHAPE, index / self.count, np.float32)


def config(**order: int) -> RunConfig:
    return resolve(
        {
            "network": {
                "base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": [],
                "condition": "none",
            },
            "train": {"steps": 9, "batch_size": 64},
            "order": order,
            "sample": {"every_steps": 0, "final": 0},
            "checkpoint": {"every_steps": 1},
            "store": {"kind": "zarr"},
            "objective": {"name": "ict", "pretrain": 0, "refined": {"share": 0.5}},
        }
    )  # fmt: skip


def train(settings: RunConfig, run: Path, count: int) -> dict[str, Any]:
    return vars(udddm.train(settings, Images(count), run_dir=run, device="cpu"))


def order_in(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["config"]["order"]
    return found


@pytest.mark.parametrize(("count", "lanes"), [(200, 8), (2000, 64)])
def test_a_run_records_its_lanes(count: int, lanes: int, tmp_path: Path) -> None:
    """With chunks of 4 samples, 64 lanes are filled from 1,024 samples on. The state on disk has these lanes."""
    train(config(chunk=4), tmp_path / "run", count)
    for file in (tmp_path / "run/run.json", *(tmp_path / "run/checkpoints").glob("*/config.json")):
        assert order_in(file)["lanes"] == lanes and order_in(file)["chunk"] == 4
    stored = json.loads((tmp_path / "run/state/zarr.json").read_text())
    assert stored["attributes"]["order"]["lanes"] == lanes


def test_a_run_of_an_earlier_version_resumes_with_its_lanes_and_windows(tmp_path: Path) -> None:
    """Its run.json has 8 lanes, which were the default for data sets of any size, and no window."""
    whole = train(config(lanes=8, chunk=4), tmp_path / "whole", 2000)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        udddm.train(config(lanes=8, chunk=4), Interrupting(2000), run_dir=run, device="cpu")
    assert order_in(run / "run.json") == {"lanes": 8, "chunk": 4, "window": None}
    assert list((run / "checkpoints").glob("step-*"))
    resumed = train(config(chunk=4), run, 2000)
    for key in ("weights_sha256", "ema_sha256", "state_sha256"):
        assert resumed[key] == whole[key]


class Interrupting(Images):
    """Ends training once many of its images were read."""

    read = 0

    def __getitem__(self, index: int) -> Any:
        Interrupting.read += 1
        if Interrupting.read > 64 * 8 + 20:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_what_is_set_explicitly_must_be_that_of_the_run(tmp_path: Path) -> None:
    train(config(chunk=4), tmp_path / "run", 2000)
    with pytest.raises(ConfigError, match=r"order\.lanes: 64 -> 8"):
        train(config(chunk=4, lanes=8), tmp_path / "run", 2000)
    with pytest.raises(ConfigError, match=r"order\.window: 1 -> 2"):
        train(config(chunk=4, window=2), tmp_path / "run", 2000)


class Recorded(Launcher):
    """Has room for 32 workers. A run with `lanes` lanes is begun."""

    def __init__(self, lanes: int):
        self.lanes, self.tried = lanes, list[int]()

    def available_workers(self, job: Job) -> int:
        return 32

    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        self.tried.append(workers)
        if self.lanes % workers:
            raise LanesError(f"{workers} ranks do not divide order.lanes={self.lanes}", self.lanes)
        return {"workers": workers}


def test_a_range_of_workers_is_tried_again_with_the_lanes_that_the_run_has() -> None:
    job = Job(config(), Path("run"), workers=(2, 32))
    few, many = Recorded(8), Recorded(64)
    assert supervise(many, job) == {"workers": 32} and many.tried == [32]
    assert supervise(few, job) == {"workers": 8} and few.tried == [32, 8]


def test_a_number_of_workers_that_the_run_cannot_have_is_refused_once() -> None:
    for job in (Job(config(), Path("run"), workers=(16, 32)), Job(config(), Path("run"), workers=(16, 16))):
        few = Recorded(8)
        with pytest.raises(LanesError, match=r"order\.lanes=8"):
            supervise(few, job)
        assert len(few.tried) == 1
    with pytest.raises(LanesError):
        supervise(Recorded(8), replace(job, config=config(lanes=16)))
