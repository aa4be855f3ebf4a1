"""`udddm train --continue`, numbered run directories, and the best weights of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import Callback, ConfigError, DataError, Interrupted
from udddm.cli.main import main
from udddm.runs import growing
from udddm.runs.run import Run

CONFIG: dict[str, Any] = {
    "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
    "objective": {"name": "edm"},
    "train": {"steps": 6, "batch_size": 8, "ema": [0.5]},
    "checkpoint": {"every_steps": 2},
    "sample": {"every_steps": 0},
    "log_every_steps": 2,
    "loggers": [],
}
DATA = np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), dtype=np.uint8)


def train(run: Path | str, steps: int = 6, data: Any = DATA, **options: Any) -> udddm.TrainResult:
    return udddm.train(CONFIG, data, run_dir=run, device="cpu", overrides={"train.steps": steps}, **options)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def fingerprints(result: udddm.TrainResult) -> tuple[str, str, str]:
    return result.weights_sha256, result.ema_sha256, result.state_sha256


class Stopping(Callback):
    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 8:
            os.kill(os.getpid(), 15)


def test_a_run_that_goes_on_is_the_longer_run(tmp_path: Path) -> None:
    """An objective without a curriculum, at a constant learning rate, does not depend on the length."""
    short = train(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == short.to_dict()
    with pytest.raises(ConfigError, match=r"train\.steps: 6 -> 12"):
        train(tmp_path / "run", 12)
    longer = train(tmp_path / "run", 12, extend=True)
    assert fingerprints(longer) == fingerprints(train(tmp_path / "whole", 12))
    assert steps(tmp_path / "run") == [2, 4, 6, 8, 10, 12]
    assert json.loads((tmp_path / "run" / "result-00000006.json").read_text()) == short.to_dict()
    assert train(tmp_path / "run", 12) == longer, "the same command without extend resumes the longer run"


def test_the_same_command_resumes_a_longer_run_that_was_stopped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    with pytest.raises(Interrupted):
        udddm.train(
            growing.planned(run, ["steps=2x"]), DATA, run_dir=run, device="cpu", extend=True, callbacks=[Stopping()]
        )
    again = growing.planned(run, ["steps=2x"])
    assert again.train.steps == 12 and growing.planned(run, []).train.steps == 12
    assert growing.planned(run, ["train.steps=20"]).train.steps == 20
    assert udddm.train(again, DATA, run_dir=run, device="cpu", extend=True).steps == 12
    assert steps(run) == [2, 4, 6, 8, 10, 12]
    assert growing.planned(run, ["train.steps=12"]).train.steps == 12, "finished already"
    assert growing.planned(run, ["steps=2x"]).train.steps == 24


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_killed_while_it_is_made_longer_can_be_made_longer_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed before the result is copied, the report or the result removed, or run.json or config.yaml written."""

    class Killed(BaseException):
        pass

    def unless_killed(action: Callable[..., None]) -> Callable[..., None]:
        def change(*given: Any) -> None:
            done.append(action)
            if len(done) == stop:
                raise Killed
            action(*given)

        return change

    run, done = tmp_path / "run", list[Any]()
    train(run)
    result = (run / "result.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(growing, "write_json", unless_killed(growing.write_json))
        patch.setattr(growing, "write_text", unless_killed(growing.write_text))
        patch.setattr(Run, "remove", unless_killed(Run.remove))
        udddm.train(growing.planned(run, ["steps=2x"]), DATA, run_dir=run, device="cpu", extend=True)
    assert any(path.read_bytes() == result for path in run.glob("result*.json")), "the result is kept"
    longer = udddm.train(growing.planned(run, ["steps=2x"]), DATA, run_dir=run, device="cpu", extend=True)
    assert longer.steps == 12 and udddm.load_config(run / "config.yaml").train.steps == 12


def test_what_a_checkpoint_depends_on_cannot_change(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changes, message in (
        (["steps=2x", "network.dropout=0.5"], r"cannot go on with network.dropout: 0.3 -> 0.5.*train.init_from="),
        (["epochs=2x"], r"the length of this run is train.steps=6: use train.steps=2x"),
        (["steps=3"], r"is train.steps=6, and 3 is not longer; say how long it shall be: train.steps=2x"),
        (["lr=1e-3"], r"is train.steps=6; say how long it shall be: train.steps=2x"),
        (["train.ema=0.9"], r"cannot go on with train.ema"),
    ):
        with pytest.raises(ConfigError, match=message):
            growing.planned(tmp_path / "run", changes)
    with pytest.raises(DataError):
        train(tmp_path / "run", 12, data=DATA[::-1].copy(), extend=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="there is no run"):
        growing.planned(tmp_path, ["steps=2x"])


def test_the_command_makes_a_run_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "data.npy", DATA)
    run = str(tmp_path / "run")
    config = {**CONFIG, "data": {"name": "array", "path": str(tmp_path / "data.npy")}, "sample": {"final": 4}}
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    assert main(["train", "--config", str(tmp_path / "mine.yaml"), "--run-dir", run, "--device", "cpu"]) == 0
    report = (tmp_path / "run" / "report.html").read_bytes()
    assert main(["train", "--continue", run, "steps=2x", "lr=1e-4", "--device", "cpu"]) == 0
    assert "12 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").read_bytes() != report
    assert main(["train", "--continue", run, "train.steps=12", "--device", "cpu"]) == 0, "finished already"


def test_new_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(CONFIG | {"data": {"name": "digits"}}))
    for _ in range(2):
        assert main(["train", "--config", "mine.yaml", "--new", "train.steps=1", "--device", "cpu"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine-001", "mine-002"]
    with pytest.raises(ConfigError, match="--new is for local directories"):
        growing.numbered("s3://bucket/run")


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Features whose Frechet distance to the data is smallest where the images are as bright as those."""
    return images.flatten(1)[:, :2]


@pytest.mark.parametrize("ema", [[0.5], []])
def test_the_best_weights_are_those_of_the_step_with_the_best_score(tmp_path: Path, ema: list[float]) -> None:
    evaluated = {"every_steps": 2, "count": 16, "features": f"{__name__}:brightness", "metrics": ["frechet"]}
    config = {
        **CONFIG,
        "evaluate": evaluated,
        "train": {"steps": 6, "batch_size": 8, "ema": ema, "learning_rate": 0.02},
        "checkpoint": {"every_steps": 2, "keep": 10, "best": "fd"},
    }
    run = tmp_path / "run"
    udddm.train(config, DATA, run_dir=run, device="cpu")
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["fd"])
    assert len(lines) == 3 and json.loads((run / "best" / "scores.json").read_text()) == best
    assert not list((run / ".best").iterdir())
    kept, checkpoint = (
        udddm.load_model(place, device="cpu")
        for place in (run / "best", run / "checkpoints" / f"step-{best['step']:08d}")
    )
    assert np.array_equal(kept.sample(range(4)), checkpoint.sample(range(4)))


def test_the_best_weights_need_scores() -> None:
    with pytest.raises(
        ConfigError, match=r"checkpoint\.best=fid needs scores during training: set evaluate.every_steps"
    ):
        udddm.load_config("digits", ["checkpoint.best=fid"])
