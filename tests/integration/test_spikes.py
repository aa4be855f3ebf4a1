"""`train.spike_factor`: training restarts from the newest checkpoint after a spike of the loss."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import Callback, Interrupted
from udddm.backends.engines.ddp import TorchEngine
from udddm.training.spikes import SteppedBack, Watch

DATA = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
RATE = 1e-3
CONFIG: dict[str, Any] = {
    "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
    "objective": {"name": "edm"},
    "train": {"steps": 60, "batch_size": 32, "learning_rate": RATE, "ema": [0.5]},
    "engine": {"name": f"{__name__}:Unstable"},
    "checkpoint": {"every_steps": 10, "keep": 3},
    "sample": {"every_steps": 0},
    "log_every_steps": 5,
    "loggers": [],
}


class Unstable(TorchEngine):
    """Takes a step in a wrong direction at step 33, whose length depends on the learning rate as in an instability."""

    def step(self, step: int) -> None:
        super().step(step)
        if step == 33:
            size = (self.learning_rate(step) / RATE) ** 8
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter += size * torch.randn(parameter.shape, generator=generator)


def train(run: Path, factor: float | None, workers: int = 1, **options: Any) -> udddm.TrainResult:
    changes = {"train.spike_factor": factor}
    return udddm.train(CONFIG, DATA, run_dir=run, device="cpu", overrides=changes, workers=workers, **options)


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def test_a_spike_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spiked = tmp_path / "spiked"
    train(spiked, None)
    assert losses(spiked)[35] > 3 * losses(spiked)[30]
    caplog.clear()
    run = tmp_path / "run"
    result = train(run, 2.0)
    events = json.loads((run / "spikes.json").read_text())
    assert result.steps == 60 and [(each["spike"], each["back_to"]) for each in events] == [(35, 30)]
    assert losses(run)[35] < 1.5 * losses(run)[30]
    assert sorted(losses(run)) == list(range(5, 61, 5)), "one line for each report, none of before a step back"
    said = [message for message in caplog.messages if "going on from the checkpoint" in message]
    assert len(said) == len(events)
    assert f"step {events[0]['spike']}: the loss is" in said[0]
    rates = {
        row["step"]: row["learning_rate"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    assert {step for step, rate in rates.items() if rate == RATE / 2} == {35, 40}


def test_the_learning_rate_is_halved_until_past_the_spike() -> None:
    event = SteppedBack(spike=50, back_to=40, loss=None, usual=1.0)
    assert [event.factor(step) for step in (39, 40, 49, 59, 60)] == [1, 0.5, 0.5, 0.5, 1]


def test_only_a_loss_above_the_usual_one_of_its_phase_is_a_spike() -> None:
    watch = Watch(3.0)
    assert [watch.see(loss, "denoiser") for loss in (9.0, 1.0, 1.2, 0.8, 2.9)] == [None] * 5
    assert watch.see(3.7, "denoiser") == pytest.approx(1.2)
    assert watch.see(100.0, "iCT") is None, "another phase has another loss"
    unknown = watch.see(math.inf, "iCT")
    assert unknown is not None and math.isnan(unknown)
    off = Watch(None)
    assert [off.see(loss, "") for loss in (1.0, 1.0, 1.0, 1e9, math.nan)] == [None] * 5


def test_ranks_step_back_together_and_a_resumed_run_remembers(tmp_path: Path, forked_workers: None) -> None:
    whole = train(tmp_path / "whole", 2.0, workers=2)
    first = json.loads((tmp_path / "whole" / "spikes.json").read_text())
    assert whole.steps == 60 and first
    with pytest.raises(Interrupted):
        train(tmp_path / "run", 2.0, workers=2, callbacks=[Stopping(first[0]["spike"], os.getpid())])
    resumed = train(tmp_path / "run", 2.0, workers=2)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert json.loads((tmp_path / "run" / "spikes.json").read_text()) == first


class Stopping(Callback):
    """Stops the run after its first step back, at the first report past the spike."""

    def __init__(self, step: int, launcher: int):
        self._step, self._launcher, self._starts = step, launcher, 0

    def on_start(self, run: udddm.RunInfo) -> None:
        self._starts += 1

    def on_metrics(self, step: int, metrics: Any) -> None:
        if self._starts == 2 and step == self._step + 5:
            os.kill(self._launcher, signal.SIGTERM)
