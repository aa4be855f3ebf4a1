"""The commands under torchrun, with two ranks: they give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import udddm
from udddm.cli.evaluate import main as evaluate_command
from udddm.cli.train import main as train_command
from udddm.runs.weights import Saved

YARDSTICK = Path(__file__).parents[2] / "benchmarks" / "yardstick"
NETWORK = {
    "base_channels": 8,
    "channel_mult": [1],
    "blocks_per_level": 1,
    "attention_resolutions": [],
    "dropout": 0.0,
    "condition": "none",
}
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(YARDSTICK), os.environ.get("PYTHONPATH", "")]),
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "udddm"]


def test_two_ranks_agree_with_one_to_float_rounding(tmp_path: Path) -> None:
    arguments = [
        *("--set", f"network={json.dumps(NETWORK)}", "--set", "train={steps: 10, batch_size: 64, ema: [0.9]}"),
        *("--set", "checkpoint.every_steps=5", "--set", "sample.every_steps=0", "--store", "zarr", "--device", "cpu"),
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_command([*arguments, "--run-dir", str(one)]) == 0
    subprocess.run([*TORCHRUN, "train", *arguments, "--run-dir", str(two)], check=True, env=ENVIRONMENT, timeout=200)
    for name in ("model", "ema-0.9"):
        a, b = (Saved(run / "checkpoints" / "step-00000010", name) for run in (one, two))
        assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert np.allclose(losses[0], losses[1], rtol=1e-4)


def test_two_ranks_make_the_samples_that_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    config = {"network": NETWORK, "train": {"steps": 4, "batch_size": 32}, "sample": {"every_steps": 0}}
    udddm.train(config, run_dir=run, device="cpu")
    arguments = ["--checkpoint", str(run), "--features", "features:digits", "--count", "70", "--batch", "20"]
    arguments += ["--repeat", "2", "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    monkeypatch.syspath_prepend(str(YARDSTICK))
    assert evaluate_command([*arguments, "--json", str(tmp_path / "one.json")]) == 0
    command = [*TORCHRUN, "evaluate", *arguments, "--json", str(tmp_path / "two.json")]
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=200)
    found = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    assert [each["n"] for each in found] == [70, 70]
    distances = [[figures["fd"] for figures in each["each"]] for each in found]
    assert len(distances[0]) == 2 and distances[1] == pytest.approx(distances[0], rel=1e-5)
