"""Progress reports: metrics.jsonl, and the metrics that a launcher receives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
        "loss": 0.25,
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
    assert "step 4/4  loss 0.25  images/s 100  store wait 10.0%" in caplog.text
    assert "ETA 1:01" in caplog.text
