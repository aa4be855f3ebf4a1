"""The trainer, engine and API on tiny runs: precisions, ranks, labels, users' data sets, and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import ConfigError, RunConfig, TrainResult
from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines.ddp import TorchEngine
from udddm.config import resolve
from udddm.data import ImageDataset
from udddm.ema import EMA
from udddm.errors import CheckpointError, DataError, Diverged
from udddm.runs.run import Run
from udddm.runs.weights import Saved
from udddm.training.trainer import Trainer

NETWORK = {
    "base_channels": 8,
    "channel_mult": [1],
    "blocks_per_level": 1,
    "attention_resolutions": [],
    "dropout": 0.0,
    "condition": "none",
}


def tiny(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "network": NETWORK,
        "train": {"steps": 6, "batch_size": 32, "learning_rate": 1e-3, "ema": [0.9]},
        "checkpoint": {"every_steps": 3},
        "sample": {"every_steps": 0},
        "log_every_steps": 3,
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return resolve(tree)


class Squares:
    """A user's data set: gray squares as float images, with labels."""

    def __init__(self, length: int = 70, shade: float = 0.5):
        self.length, self.shade = length, shade

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.full((1, 6, 6), -1, np.float32)
        image[:, : 1 + index % 5, : 1 + index % 3] = self.shade
        return image, index % 4


def train(config: RunConfig, run: Path, dataset: Any = None) -> TrainResult:
    return udddm.train(config, dataset or Squares(), run_dir=run, device="cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_and_keeps_float32_weights(precision: str, tmp_path: Path) -> None:
    train(tiny(train={"precision": precision, "grad_clip": 1.0}), tmp_path)
    directory = tmp_path / "checkpoints" / "step-00000006"
    for name in ("model", "ema-0.9"):
        weights = Saved(directory, name)
        assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in weights.values())
    assert ("scaler" in Saved(directory, "optimizer")) == (precision == "fp16")


def test_init_from_loads_the_first_average_of_another_run(tmp_path: Path) -> None:
    """Both weights and averages are loaded. A resumed run no longer reads the other run."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(tiny(), first)
    config = tiny(train={"init_from": str(first), "learning_rate": 1e-12, "ema": [0.5, 0.9]})
    train(config, second)
    begun = Saved(first / "checkpoints" / "step-00000006", "ema-0.9")
    for kind in ("model", "ema-0.5", "ema-0.9"):
        weights = Saved(second / "checkpoints" / "step-00000006", kind)
        assert max(float((weights[n] - begun[n]).abs().max()) for n in begun) < 1e-9, kind
    result = json.loads((second / "result.json").read_text())
    (second / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    (second / "result.json").unlink()
    first.rename(tmp_path / "elsewhere")
    assert train(config, second)["weights_sha256"] == result["weights_sha256"]


def test_init_from_refuses_a_different_network(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "first")
    config = tiny(network={"base_channels": 16}, train={"init_from": str(tmp_path / "first")})
    with pytest.raises(CheckpointError, match="belongs to a different network"):
        train(config, tmp_path / "second")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        train(tiny(train={"init_from": str(tmp_path / "nowhere")}), tmp_path / "third")


def test_a_run_of_an_older_version_resumes_with_defaults_for_new_settings(tmp_path: Path) -> None:
    """Its run.json lacks settings that were added later, whose defaults describe it."""
    result = train(tiny(), tmp_path)
    path = tmp_path / "run.json"
    recorded = json.loads(path.read_text())
    del recorded["config"]["train"]["init_from"]
    path.write_text(json.dumps(recorded))
    (tmp_path / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    (tmp_path / "result.json").unlink()
    assert train(tiny(), tmp_path)["weights_sha256"] == result["weights_sha256"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_interrupted_run_has_the_fingerprints_of_an_uninterrupted_run(precision: str, tmp_path: Path) -> None:
    """An exception in the data set stops the run. After resuming, fingerprints equal those of an undisturbed run."""

    class Failing(Squares):
        reads = 0

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            self.reads += 1
            if self.reads > 32 * 9:
                raise OSError("the disk went away")
            return super().__getitem__(index)

    network = {**NETWORK, "dropout": 0.2}
    config = tiny(train={"precision": precision, "steps": 8}, network=network)
    whole = train(config, tmp_path / "whole")
    with pytest.raises((OSError, DataError)):
        train(config, tmp_path / "parts", Failing())
    assert list((tmp_path / "parts" / "checkpoints").iterdir())
    parts = train(config, tmp_path / "parts")
    for key in ("weights_sha256", "ema_sha256", "state_sha256"):
        assert whole[key] == parts[key], key


def test_labels_reach_the_network(tmp_path: Path) -> None:
    train(tiny(network={**NETWORK, "classes": 4}, train={"steps": 20, "learning_rate": 1e-2}), tmp_path)
    seeds = [0, 1, 2]
    assert not np.array_equal(
        udddm.sample(tmp_path, seeds, labels=[0, 0, 0]), udddm.sample(tmp_path, seeds, labels=[3, 3, 3])
    )


def test_the_loss_is_averaged_over_samples_and_not_over_padding(tmp_path: Path) -> None:
    """70 samples in batches of 32: the third step has 6. In its first epoch a trajectory is at the lowest level, where
    the losses of all samples are alike, and a learning rate near 0 keeps them so."""
    config = tiny(
        train={"steps": 3, "learning_rate": 1e-9},
        objective={"chain": {"length": "trajectory"}, "huber_c": 0.01},
        log_every_steps=1,
    )
    train(config, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and max(losses) < 2 * min(losses)


def test_a_changed_data_set_is_refused(tmp_path: Path) -> None:
    config = tiny()
    train(config, tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(DataError, match="70"):
        train(config, tmp_path, Squares(71))
    with pytest.raises(DataError):
        train(config, tmp_path, Squares(shade=0.25))
    train(config, tmp_path)


def test_fewer_samples_than_lanes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"order\.lanes"):
        train(tiny(order={"lanes": 8}), tmp_path, Squares(5))


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        udddm.train(tiny(), Squares(0), run_dir=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def finite(run: Path) -> list[str]:
    """The names of the checkpoints of a run. Asserts that all their values are finite."""
    found = sorted((run / "checkpoints").glob("step-*"))
    for path in found:
        for kind in ("model", "ema-0.9", "optimizer"):
            assert all(bool(value.isfinite().all()) for value in Saved(path, kind).values()), (path, kind)
    return [path.name for path in found]


def test_a_diverged_run_raises_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="learning_rate"):
        train(tiny(train={"learning_rate": 1e18, "steps": 60}, checkpoint={"every_steps": 1}), tmp_path)
    assert not (tmp_path / "result.json").exists()
    finite(tmp_path)


@pytest.mark.parametrize("what", ["gradient", "moment", "average"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_checkpoint_contains_values_that_are_not_finite(
    what: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hardware fault in the last step before a checkpoint, whose loss is still finite. A restart fixes it."""
    step = TorchEngine.optimizer_step
    taken = 0

    def faulty(engine: TorchEngine) -> None:
        nonlocal taken
        taken += 1
        if taken == 6 and what == "gradient":
            next(iter(engine._parameters.values())).grad.view(-1)[0] = value
        step(engine)
        if taken == 6 and what == "moment":
            list(engine.moments()["exp_avg_sq"].values())[-1].view(-1)[0] = value

    if what == "average":
        update = EMA.update

        def overwritten(average: EMA, number: int) -> None:
            update(average, number)
            if taken == 6:
                next(iter(average.weights.values())).view(-1)[0] = value

        monkeypatch.setattr(EMA, "update", overwritten)
    monkeypatch.setattr(TorchEngine, "optimizer_step", faulty)
    settings = tiny(train={"steps": 9})
    kept = tmp_path / "run" / "checkpoints" / "step-00000003"
    said = rf"after step 6\. .* from step 3, .*start a new run .--run-dir., with train.init_from={kept} "
    with pytest.raises(Diverged, match=said):
        train(settings, tmp_path / "run")
    assert finite(tmp_path / "run") == [kept.name]
    again = train(settings, tmp_path / "run")
    undisturbed = train(settings, tmp_path / "other")
    for key in ("weights_sha256", "ema_sha256", "state_sha256"):
        assert again[key] == undisturbed[key], key


def test_divergence_before_the_first_checkpoint_names_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="there is no checkpoint yet; to lower train"):
        train(tiny(train={"learning_rate": 1e30, "steps": 60}, checkpoint={"every_steps": 50}), tmp_path)


@pytest.mark.parametrize("kind", ["gpu", "pinned"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "uint8"])
def test_a_row_that_is_not_finite_keeps_its_previous_state(kind: str, dtype: str, tmp_path: Path) -> None:
    config = tiny(store={"kind": kind, "dtype": dtype}, order={"lanes": 1}, log_every_steps=1)
    dataset = ImageDataset(Squares(64))
    trainer = Trainer(config, dataset, Run(tmp_path), Ranks(0, 1, torch.device("cpu")))
    inputs = trainer.begin()
    ids = trainer.order.batch_of(range(1), 0, 0).ids

    def states() -> dict[int, bytes]:
        chunks = range(trainer.order.num_chunks(0))
        samples = [int(i) for chunk in chunks for i in trainer.order.chunk_samples(0, chunk)]
        rows = np.concatenate([trainer.store.rows(0, chunk) for chunk in chunks])
        return {sample: row.tobytes() for sample, row in zip(samples, rows, strict=False)}

    def spoil(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[3, 0, 2, 1] = math.nan
        output[5] = math.inf
        return output

    before = states()
    hook = trainer.engine.module.register_forward_hook(spoil)
    trainer.train_step(inputs)
    hook.remove()
    after = states()
    visited = {int(i) for i in ids}
    assert {i for i in visited if before[i] == after[i]} == {int(ids[3]), int(ids[5])}
    reports = trainer._start_reports()
    trainer.step += 1  # a report is of at least one step
    trainer._report(None, reports)
    assert trainer.store.counters.kept == 2
    inputs.close()
    trainer.store.close()


def test_a_run_directory_is_locked(tmp_path: Path) -> None:
    from udddm.runs.run import locked

    with locked(tmp_path), pytest.raises(ConfigError, match="another process"):
        train(tiny(), tmp_path)
