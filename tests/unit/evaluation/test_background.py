"""Evaluation during training: a bounded queue, and scores that survive a disk that was full for a while."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.config import EvaluateConfig, resolve
from udddm.data import ImageDataset
from udddm.evaluation import background, evaluate
from udddm.evaluation.background import BackgroundEvaluation, RunEvaluation

GATE = threading.Event()
"""The feature network waits for it."""
ENTERED = threading.Event()
"""Set once the feature network was called."""
CALLS: list[int] = []


def features(images: Any) -> Any:
    ENTERED.set()
    GATE.wait(60)
    CALLS.append(len(images))
    return images.flatten(1)[:, :4]


@pytest.fixture(autouse=True)
def gate() -> Iterator[None]:
    GATE.clear()
    ENTERED.clear()
    CALLS.clear()
    yield
    GATE.set()


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BackgroundEvaluation:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    config = EvaluateConfig(every_steps=1, count=4, features=f"{__name__}:features", metrics=("frechet",))
    return BackgroundEvaluation(config, ImageDataset(images), torch.device("cpu"), tmp_path)


def images(count: int = 8) -> torch.Tensor:
    return torch.linspace(-1, 1, count * 16).reshape(count, 1, 4, 4)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "evaluation.jsonl").read_text().splitlines()]


def test_a_step_is_skipped_once_many_evaluations_wait(
    scores: BackgroundEvaluation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores.submit(0, images(), 1)
    assert ENTERED.wait(60)  # one is in progress, and no longer waits
    accepted = 1
    while scores.accepts(accepted) and accepted < 100:
        scores.submit(accepted, images(), 1)
        accepted += 1
    assert accepted == background.WAITING + 1
    assert not scores.accepts(100) and not scores.accepts(101)
    assert len(caplog.messages) == 1 and "is not scored, because" in caplog.messages[0]
    GATE.set()
    assert scores.wait(60)
    assert steps(tmp_path) == list(range(accepted))
    assert scores.accepts(102)
    scores.cancel()
    assert "3 evaluations were skipped" in caplog.messages[-1]


def test_the_size_of_the_waiting_images_is_bounded(
    scores: BackgroundEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "WAITING_BYTES", 2 * images().nbytes)
    for step in range(3):
        scores.submit(step, images(), 1)
    assert not scores.accepts(3)
    scores.cancel()


def test_cancelling_stops_the_evaluation_in_progress_after_its_batch(
    scores: BackgroundEvaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluate, "BATCH", 2)
    scores.submit(1, images(200), 1)
    scores.submit(2, images(), 1)
    threading.Timer(0.05, GATE.set).start()
    scores.cancel()
    assert len(CALLS) < 10 and not (tmp_path / "evaluation.jsonl").exists()
    assert "step 1, 2" in caplog.messages[-1]


def test_scores_that_could_not_be_written_are_written_later(
    scores: BackgroundEvaluation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "udddm")
    GATE.set()
    (tmp_path / "evaluation.jsonl.partial").mkdir()  # stands for a full disk
    for step in (1, 2):
        scores.submit(step, images(), 1)
    assert scores.wait(60)
    assert not (tmp_path / "evaluation.jsonl").exists()
    assert sum("cannot write evaluation.jsonl" in message for message in caplog.messages) == 1
    assert any("step 2: 8 images scored" in message for message in caplog.messages)
    (tmp_path / "evaluation.jsonl.partial").rmdir()
    scores.submit(3, images(), 1)
    assert scores.wait(60)
    assert steps(tmp_path) == [1, 2, 3]
    scores.cancel()


def test_a_draw_that_a_request_to_stop_ends_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    GATE.set()
    settings = {"every_steps": 2, "count": 8, "features": f"{__name__}:features", "metrics": ["frechet"]}
    data = ImageDataset(np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8))
    alone = Ranks(0, 1, torch.device("cpu"))
    run = RunEvaluation(resolve({"evaluate": settings}), data, alone, tmp_path)
    drawn: list[int] = []

    def draw(count: int) -> torch.Tensor:
        drawn.append(count)
        return images(8 if len(drawn) == 1 else 3)

    for step in range(1, 7):
        run.after_step(step, draw, last=False)
    assert run.finish(lambda: 0) == 0
    run.cancel()
    assert drawn == [8, 8, 8] and steps(tmp_path) == [2]
    assert caplog.messages == [f"step {step} is not scored, because training ends" for step in (4, 6)]
