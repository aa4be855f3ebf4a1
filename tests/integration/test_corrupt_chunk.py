"""Training with a corrupt chunk: the command stops by default, and continues with --on-corruption reinitialize."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from udddm.cli.train import main as train_command


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SETTINGS = (
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0, condition: none}",
    "order={lanes: 2, chunk: 32, window: 2}",
    "train={steps: 70, batch_size: 64, learning_rate: 0.001, ema: [0.9]}",
    "checkpoint.every_steps=30",
    "sample.every_steps=0",
    "log_every_steps=10",
)


def train(run: Path, *arguments: str) -> int:
    settings = [part for each in SETTINGS for part in ("--set", each)]
    return train_command(["--run-dir", str(run), "--device", "cpu", "--store", "zarr", *settings, *arguments])


def test_a_corrupt_chunk_stops_the_command_unless_it_is_reinitialized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, "--set", "train.steps=70") == 0
    # Back to the checkpoint of step 60, in epoch 2 of 29 steps: two of its chunks are damaged.
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000070")
    generation = sorted((run / "state").glob("gen-*"))[0]
    assert generation.name == "gen-000002"
    chunk = generation / "c" / "1" / "3" / "0" / "0" / "0"
    flip(chunk)
    assert train(run) == 1
    said = capsys.readouterr().err
    assert "generation 2, lane 1, chunk 3 is damaged" in said and "--on-corruption" in said
    assert (run / "checkpoints" / "step-00000060").exists() and not (run / "result.json").exists()
    assert train(run, "--on-damage", "reinitialize") == 0
    assert json.loads((run / "result.json").read_text())["store_reinitialized"] == 32
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["store_reinitialized"] == 32
    assert np.isfinite(lines[-1]["loss"])
