"""A run continues when nothing reads its messages any more, as after `2>&1 | head`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TINY = [
    "--set=network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], "
    "dropout: 0, condition: none}",
    "--set=train={steps: 6, batch_size: 64, learning_rate: 1.0e-3, ema: [0.9]}",
    "--set=checkpoint.every_steps=3",
    "--set=sample={every_steps: 0, final: 9}",
    "--set=log_every_steps=2",
    "--device=cpu",
]


@pytest.mark.parametrize("reader", ["closed", "absent"])
def test_a_run_survives_the_loss_of_its_stderr(reader: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "udddm", "train", "--run-dir", str(tmp_path / "run"), *TINY]
    if reader == "closed":
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None and process.stderr.readline()
        process.stderr.close()
    else:
        process = subprocess.Popen(["sh", "-c", '"$@" 2>&-', "sh", *command])
    process.wait(timeout=200)
    assert (tmp_path / "run" / "result.json").exists()
