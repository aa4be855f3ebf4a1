"""The line at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from udddm.config import load_config
from udddm.runs.result import TrainResult
from udddm.runs.summary import last_line

RESULT = TrainResult(6000, 207.0, 900.0, 0.0, 1, "", "", "")


@pytest.mark.parametrize(("seconds", "time"), [(7.4, "7 s"), (61, "1 min 1 s"), (3600 * 5 + 120, "5 h 2 min")])
def test_it_has_time_images_loss_score_samples_and_what_to_type(tmp_path: Path, seconds: float, time: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"images": 384000, "loss": 0.125}\n{"images": 38')
    (tmp_path / "evaluation.jsonl").write_text('{"step": 6000, "fd": 16.1, "kid": 0.01}\n')
    assert last_line(load_config("digits"), tmp_path, RESULT, seconds) == (
        f"done in {time}: 6,000 steps, 384 kimg, loss 0.125, fd 16.1, 1,000 samples in {tmp_path}/samples.png. "
        f"Next: udddm sample {tmp_path} --count 100 --nfe 4"
    )


def test_a_run_at_a_url_without_samples_has_the_rest() -> None:
    line = last_line(load_config("digits", ["sample.final=0"]), "s3://bucket/run", RESULT, 7)
    assert line == "done in 7 s: 6,000 steps. Next: udddm sample s3://bucket/run --count 100 --nfe 4"
