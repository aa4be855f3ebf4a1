"""Progress reports: metrics.jsonl, and the metrics that a launcher receives."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import udddm
from udddm.runs.run import Run
from udddm.training.progress import Progress


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_after_the_checkpoint_are_dropped_when_a_run_resumes(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 40, "lo']))  # killed while it wrote a line
    received: list[tuple[int, int, dict[str, float]]] = []
    progress = Progress(tmp_path, 20, 100, lambda *values: received.append(values))
    assert steps(tmp_path) == [10, 20]
    progress.write(30, {"loss": 0.5})
    progress.close()
    assert steps(tmp_path) == [10, 20, 30]
    assert received == [(30, 100, {"loss": 0.5})]


def test_progress_is_logged_at_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "udddm")
    values = {
        "images": 256,
        "loss": 0.25,
        "learning_rate": 7.0e-4,
        "gradient_norm": 1.5,
        "images_per_second": 100.0,
        "store_wait_fraction": 0.1,
        "store_megabytes_per_second": 3.0,
        "store_queue_depth": 2.0,
        "store_retries": 1.0,
        "eta_seconds": 61.0,
    }
    progress = Progress(tmp_path, 0, 4)
    progress.write(4, values)
    progress.close()
    line = r"\d\d:\d\d:\d\d  step 4/4  kimg 0\.256  loss 0\.25  lr 0\.0007  grad 1\.5  images/s 100  store wait 10\.0%"
    assert re.search(line + r".*ETA 1:01", caplog.text)


def test_a_store_that_transfers_nothing_is_not_in_the_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "udddm")
    progress = Progress(tmp_path, 0, 4)
    progress.write(4, VALUES)
    progress.close()
    assert "step 4/4  loss 0.25  images/s 100  ETA 1:01" in caplog.text


VALUES = {
    "loss": 0.25,
    "images_per_second": 100.0,
    "store_wait_fraction": 0.1,
    "store_megabytes_per_second": 0.0,
    "eta_seconds": 61.0,
}


def test_a_full_disk_is_reported_once_and_its_line_is_complete_or_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, full = Progress(tmp_path, 0, 100), [False]
    opened = Path.open

    class Filling:
        """A file on a disk that becomes full in the middle of a line."""

        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> Filling:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[: len(text) // 2] if full[0] else text)
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode="r", *more: Filling(opened(path, mode, *more)))
    progress.write(1, VALUES)
    full[0] = True
    progress.write(2, VALUES)
    progress.write(3, VALUES)
    full[0] = False
    progress.write(4, VALUES)
    monkeypatch.undo()
    assert steps(tmp_path) == [1, 4]
    warned = [message for message in caplog.messages if "cannot write" in message]
    assert warned == ["cannot write metrics.jsonl: [Errno 28] No space left on device. Training continues without it"]
    progress.close()


def test_a_run_continues_without_tensorboard_and_pictures_if_they_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def in_the_way(self: Run) -> None:
        for name in ("tensorboard", "samples"):
            (run / name).write_text("in the way")

    monkeypatch.setattr(Run, "persist", in_the_way)  # called when the run is recorded, and with each checkpoint
    config = {
        "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
        "train": {"steps": 4, "batch_size": 8},
        "store": {"kind": "gpu"},
        "sample": {"every_steps": 1},
    }
    data = np.zeros((16, 1, 8, 8), np.uint8)
    assert udddm.train(config, data, run_dir=run, device="cpu")["steps"] == 4
    warned = [message.partition(":")[0] for message in caplog.messages if message.startswith("cannot write")]
    assert sorted(warned) == ["cannot write TensorBoard's files", "cannot write the pictures of samples"]
