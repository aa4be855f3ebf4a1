"""The profile of a run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import Callback, Interrupted

CONFIG: dict[str, Any] = {
    "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
    "train": {"steps": 16, "batch_size": 8, "ema": []},
    "store": {"kind": "gpu"},
    "sample": {"every_steps": 0},
    "loggers": [],
}
DATA = np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.profiler")
def test_a_profile_has_a_trace_of_the_steps_and_a_table_of_their_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "udddm")
    plain = udddm.train(CONFIG, DATA, run_dir=tmp_path / "plain", device="cpu")
    profiled = udddm.train(CONFIG | {"profile_steps": 4}, DATA, run_dir=tmp_path / "run", device="cpu")
    assert profiled.weights_sha256 == plain.weights_sha256
    events = json.loads((tmp_path / "run" / "profile" / "rank0.trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "udddm: optimizer" for event in events if event.get("ph") == "X") == 4
    rows = (tmp_path / "run" / "profile" / "rank0.txt").read_text().partition("\n\n")[0].splitlines()[1:]
    shares = {row[:28].strip(): float(row.split()[-1].rstrip("%")) for row in rows}
    assert {"forward", "backward", "optimizer", "inputs", "x0-state: read"} < set(shares)
    assert shares.pop("step") == 100
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert "profile of 4 steps in" in caplog.text


class Stopping(Callback):
    """Stops the run in the middle of its profile."""

    def on_metrics(self, step: int, metrics: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.profiler")
def test_a_run_that_stops_ends_its_profile(tmp_path: Path) -> None:
    stopping = CONFIG | {"profile_steps": 100, "log_every_steps": 13}
    with pytest.raises(Interrupted):
        udddm.train(stopping, DATA, run_dir=tmp_path / "run", device="cpu", callbacks=[Stopping()])
    assert not torch.autograd.profiler._is_profiler_enabled
    assert (tmp_path / "run" / "profile" / "rank0.txt").exists()


def test_a_run_that_is_too_short_for_a_profile_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = CONFIG | {"profile_steps": 4, "train": {"steps": 3, "batch_size": 8}}
    udddm.train(short, DATA, run_dir=tmp_path / "run", device="cpu")
    assert "no profile was written: the run had 3 steps, and the first 10 are not traced" in caplog.text
