"""Runs with conditioning images from the data set: resumed, on two ranks, with reading processes, and sampled."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm.backends.distributed.ranks import Ranks
from udddm.cli.evaluate import main as evaluate_command
from udddm.config import RunConfig, resolve
from udddm.data import ImageDataset, load_dataset
from udddm.errors import ConfigError
from udddm.runs.weights import Saved
from udddm.testing.ranks import on_ranks
from udddm.testing.runs import reopen
from udddm.tools import export
from udddm.training.rank import train_rank

FINGERPRINTS = ("weights_sha256", "ema_sha256", "state_sha256")
CONDITIONS: list[dict[str, Any]] = [{"kind": "pairs"}, {"kind": "mask"}, {"kind": "downscale", "factor": 2}]


class Shifted:
    """Gray squares at random places; the condition is the negative of the image."""

    def __init__(self, paired: bool = True):
        self.paired = paired

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        image = np.zeros((1, 4, 4), np.uint8)
        image[0, index % 3 : index % 3 + 2, index // 3 % 3 : index // 3 % 3 + 2] = 255
        return (image, 255 - image) if self.paired else image


def config_of(condition: dict[str, Any], steps: int = 16, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "data": {"condition": condition, "flip": True},
        "schedule": {"kind": "ve", "sigma_min": 0.05, "sigma_max": 30.0},
        "network": {
            "base_channels": 8,
            "channel_mult": [1],
            "blocks_per_level": 1,
            "attention_resolutions": [],
            "dropout": 0.1,
            "condition": "channels",
        },
        "objective": {"name": "chain", "pretrain": 0.25},
        "train": {"steps": steps, "batch_size": 32, "torch_threads": 1, "ema": [0.9]},
        "checkpoint": {"every_steps": 6},
        "log_every_steps": 4,
        "sample": {"every_steps": 8, "final": 4},
        "loggers": [],
    }
    return resolve(tree | sections)


def data_of(condition: dict[str, Any]) -> Shifted:
    return Shifted(paired=condition["kind"] == "pairs")


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda each: each["kind"])
def test_a_run_resumes_bit_for_bit_with_another_store_and_reading_processes(
    tmp_path: Path, condition: dict[str, Any]
) -> None:
    data = data_of(condition)
    whole = udddm.train(config_of(condition, store="gpu"), data, run_dir=tmp_path / "whole", device="cpu")
    again = tmp_path / "again"
    udddm.train(config_of(condition, store="zarr"), data, run_dir=again, device="cpu")
    reopen(again)
    reading = {"condition": condition, "flip": True, "workers": 2}
    resumed = udddm.train(config_of(condition, store="pinned", data=reading), data, run_dir=again, device="cpu")
    assert [resumed[key] for key in FINGERPRINTS] == [whole[key] for key in FINGERPRINTS]
    samples = [np.load(run / "samples.npy") for run in (tmp_path / "whole", again)]
    assert np.array_equal(*samples)


def _train(config: RunConfig, where: Path, condition: dict[str, Any], ranks: Ranks) -> None:
    train_rank(config, data_of(condition), where, ranks)


def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    condition: dict[str, Any] = {"kind": "pairs"}
    network = {**config_of(condition).network.model_dump(), "dropout": 0.0}
    config = config_of(condition, steps=6, network=network)
    runs = []
    for world in (1, 2):
        runs.append(tmp_path / str(world))
        on_ranks(world, tmp_path, functools.partial(_train, config, runs[-1], condition))
    one, two = (Saved(run / "checkpoints" / "step-00000006", "model") for run in runs)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
    samples = [np.load(run / "samples.npy") for run in runs]
    assert np.allclose(*samples, atol=1e-4)


def test_a_network_learns_what_the_condition_says(tmp_path: Path) -> None:
    config = config_of(
        {"kind": "pairs"},
        steps=150,
        objective={"name": "edm"},
        sample={"every_steps": 0},
        train={"steps": 150, "batch_size": 32, "learning_rate": 5e-3, "torch_threads": 1, "ema": [0.9]},
    )
    udddm.train(config, Shifted(), run_dir=tmp_path / "run", device="cpu")
    model = udddm.load_model(tmp_path / "run", device="cpu")
    images, conditions = (np.stack(each) for each in zip(*(Shifted()[i] for i in range(9)), strict=True))
    real = images / 127.5 - 1
    right = np.abs(model.sample(range(9), conditions=conditions) - real).mean()
    wrong = np.abs(model.sample(range(9), conditions=conditions[::-1].copy()) - real).mean()
    assert right < 0.15 < 2 * right + 0.15 < wrong


def test_a_run_is_scored_with_the_conditions_of_its_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "yardstick"))
    data = {"name": "digits", "condition": CONDITIONS[2]}
    config = config_of(CONDITIONS[2], steps=2, data=data, objective={"name": "ect"}, sample={"every_steps": 0})
    run, out = tmp_path / "run", tmp_path / "scores.json"
    udddm.train(config, run_dir=run, device="cpu")
    arguments = ["--features", "features:digits", "--count", "20", "--device", "cpu", "--json", str(out)]
    assert evaluate_command([str(run), *arguments, "--cache", str(tmp_path / "cache")]) == 0
    model = udddm.load_model(run, device="cpu")
    images, dataset = ImageDataset(load_dataset(config.data)).batch(np.arange(20))[0], load_dataset(config.data)
    small = torch.nn.functional.avg_pool2d(images, 2)
    scores = udddm.evaluate(model.sample(range(20), conditions=small), dataset, features="features:digits")
    assert scores.fd is not None and json.loads(out.read_text())["fd"] == pytest.approx(scores.fd, rel=1e-4)


def test_sampling_needs_the_conditions_that_the_model_was_trained_with(tmp_path: Path) -> None:
    config = config_of(CONDITIONS[2], steps=2, objective={"name": "ect"}, sample={"every_steps": 0})
    udddm.train(config, Shifted(paired=False), run_dir=tmp_path / "run", device="cpu")
    model = udddm.load_model(tmp_path / "run", device="cpu")
    small = torch.rand(3, 1, 2, 2) * 2 - 1
    images = model.sample(range(3), conditions=small, batch=2)
    assert np.array_equal(images[2:], model.sample([2], conditions=small[2:], batch=2))
    assert not np.array_equal(images[2:], model.sample([2], conditions=small[:1], batch=2))
    assert np.array_equal(model.sample([0, 1], conditions=small[0], batch=2)[:1], images[:1])
    lines = export.write(tmp_path / "run", tmp_path / "out", "safetensors")
    # The configuration has the digits, but the images came from an object.
    assert any("the data set is not at hand: the data set is not the one this run" in line for line in lines)
    assert not (tmp_path / "out" / "grid.png").exists()
    for arguments, message in (
        ({}, "conditioned on images .*kind=downscale.*give one for each seed"),
        ({"conditions": torch.zeros(1, 1, 4, 4)}, r"give 1 or 3 images \[N, 1, 2, 2\], not \[1, 1, 4, 4\]"),
        ({"conditions": small, "sampler": "algorithm-2", "steps": 2}, "algorithm-2 conditions .* use renoise"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.sample(range(3), **arguments)
