"""Callbacks and loggers: what they receive, and that none of them ends a run. Loggers are read back with the packages
that they write for."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import Callback, ConfigError, Interrupted, RunInfo
from udddm.training import loggers
from udddm.training.loggers.tensorboard import Events

CONFIG: dict[str, Any] = {
    "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
    "train": {"steps": 6, "batch_size": 8},
    "store": {"kind": "gpu"},
    "sample": {"every_steps": 3},
    "log_every_steps": 2,
    "loggers": [],
    "evaluate": {"every_steps": 3, "count": 8, "features": f"{__name__}:features", "metrics": ["frechet"]},
}
DATA = np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), dtype=np.uint8)
TOLD: list[tuple[str, Any]] = []


def features(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :4]


class Recorder(Callback):
    """Records its calls."""

    def on_start(self, run: RunInfo) -> None:
        TOLD.append(("start", (run.step, run.total_steps, run.shape)))

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        TOLD.append(("metrics", (step, dict(metrics))))

    def on_images(self, step: int, images: torch.Tensor) -> None:
        TOLD.append(("images", (step, tuple(images.shape))))

    def on_scores(self, step: int, scores: Mapping[str, Any]) -> None:
        TOLD.append(("scores", (step, scores["fd"])))

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        TOLD.append(("end", None if result is None else result["steps"]))


class Failing(Callback):
    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ValueError(f"no room for step {step}")


class Stopping(Callback):
    """Stops the run as an interrupt from the keyboard does."""

    def on_images(self, step: int, images: torch.Tensor) -> None:
        os.kill(os.getpid(), 2)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    TOLD.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)


def train(run: Path, callbacks: Any = (), **changes: Any) -> udddm.TrainResult:
    return udddm.train({**CONFIG, **changes}, DATA, run_dir=run, device="cpu", callbacks=callbacks)


def of(kind: str) -> list[Any]:
    return [value for name, value in TOLD if name == kind]


def test_a_callback_receives_the_metrics_pictures_scores_and_result(tmp_path: Path) -> None:
    train(tmp_path / "run", [Recorder()])
    assert TOLD[0] == ("start", (0, 6, (1, 8, 8))) and TOLD[-1] == ("end", 6)
    assert [step for step, _ in of("metrics")] == [2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in of("metrics")] == lines
    assert of("images") == [(3, (64, 1, 8, 8)), (6, (64, 1, 8, 8))]
    scores = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert of("scores") == [(line["step"], line["fd"]) for line in scores] and len(scores) == 2
    assert len(of("start")) == len(of("end")) == 1


def test_the_loss_by_noise_level_is_the_loss_in_parts(tmp_path: Path) -> None:
    train(tmp_path / "run", [Recorder], log_every_steps=6)
    ((_, values),) = of("metrics")
    parts = [value for name, value in values.items() if name.startswith("loss_sigma_")]
    assert len(parts) >= 2 and min(parts) <= values["loss"] <= max(parts)


def test_a_callback_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train(tmp_path / "run", [Failing(), Recorder()]).steps == 6
    failed = [record for record in caplog.records if "failed" in record.message]
    assert len(failed) == 1 and failed[0].exc_info is not None
    assert failed[0].message.startswith("Failing.on_metrics failed: ValueError: no room for step 2")
    assert len(of("metrics")) == 3


def test_a_stopped_run_has_no_result_and_a_resumed_one_its_step(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "run", [Recorder(), Stopping()])
    assert TOLD[-1] == ("end", None)
    stopped = of("images")[-1][0] + 1
    TOLD.clear()
    train(tmp_path / "run", [f"{__name__}:Recorder"])
    assert TOLD[0] == ("start", (stopped, 6, (1, 8, 8))) and TOLD[-1] == ("end", 6)


def test_workers_receive_the_callbacks(tmp_path: Path, forked_workers: None) -> None:
    udddm.train(CONFIG, DATA, run_dir=tmp_path / "run", device="cpu", workers=2, callbacks=[Writer(tmp_path / "told")])
    assert (tmp_path / "told").read_text() == "6"


class Writer(Callback):
    """Writes the last step to a file, because it runs in another process."""

    def __init__(self, path: Path):
        self._path = path

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        assert result is not None
        self._path.write_text(str(result["steps"]))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Recorder(), "give a list of callbacks"),
        ([3], "3 is a int; give an object of a subclass of udddm.Callback"),
        ([dict], "returned a dict, not a udddm.Callback"),
        (["nowhere:Thing"], "there is no module nowhere"),
    ],
)
def test_something_else_than_a_callback_is_refused(tmp_path: Path, callbacks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", callbacks)


def test_an_unknown_logger_is_refused_before_the_run_directory_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown logger 'tensorbord'; did you mean tensorboard\?"):
        train(tmp_path / "run", loggers=["tensorbord"])
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_scalars_in_groups_pictures_and_scores(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path / "run", [Recorder()], loggers="tensorboard")
    found = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    shown = {event.step: event.value for event in found.Scalars("train/loss")}
    assert shown == pytest.approx({step: values["loss"] for step, values in of("metrics")})
    assert {"speed/images_per_second", "position/epoch", "scores/fd"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Images("samples")] == [3, 6]
    assert found.Images("samples")[0].encoded_image_string.startswith(b"\x89PNG")


def test_tensorboard_reads_the_events_and_hides_those_of_steps_that_are_repeated(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, last in ((0, 4), (2, 3)):
        events = Events(tmp_path, start + 1)
        for step in range(start + 1, last + 1):
            events.scalars(step, {"loss": float(10 * start + step)})
        events.close()
    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 23.0)]


def test_a_full_disk_under_tensorboard_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    events = Events(tmp_path, 1)
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), events._file.fileno())
    for step in range(1, 4):
        events.scalars(step, {"loss": 1.0})
    events.close()
    assert [message.partition(":")[0] for message in caplog.messages] == ["cannot write TensorBoard's files"]


def log_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, after the header of 7 bytes of Weights & Biases."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", [Stopping()], loggers=["wandb"])
    train(tmp_path / "run", [], loggers=["wandb"])
    ids, steps, pictures = set(), [], 0
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    for file in files:
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                if "train/loss" in row:
                    steps.append(row["step"])
                pictures += "samples" in row
    assert len(files) == 2 and ids == {json.loads((tmp_path / "run" / "run.json").read_text())["id"]}
    assert steps == [2, 4, 6] and pictures == 2


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", [Stopping()], loggers=["mlflow"])
    train(tmp_path / "run", [Recorder()], loggers=["mlflow"])
    client = mlflow.MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("udddm").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "6"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [2, 4, 6]
    assert run.data.metrics["scores/fd"] == pytest.approx(of("scores")[-1][1])
    assert [Path(each.path).name for each in client.list_artifacts(run.info.run_id, "samples")] == [
        "step-00000003.png",
        "step-00000006.png",
    ]


def test_scores_of_several_networks_have_a_group_each() -> None:
    scores = {"step": 1, "n": 8, "fid": 2.0, "kid": math.nan, "networks": {"dinov2#0a1b": {"n": 8, "fd": 3.0}}}
    assert loggers.scalars(scores) == {"scores/fid": 2.0, "scores/dinov2_0a1b/fd": 3.0}
