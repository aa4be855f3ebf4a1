"""Dropout per phase: the probability of every step, with compiled networks and CUDA graphs, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import api, networks, objectives
from udddm.backends.engines.graphs import GraphedNetwork
from udddm.config import RunConfig, resolve
from udddm.data import ArrayImages
from udddm.diffusion import schedule
from udddm.errors import ConfigError
from udddm.networks.blocks import dropout_layers
from udddm.training.dropout import Dropout

SHAPE = (1, 4, 4)
IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (32, *SHAPE), dtype=np.uint8))
FINGERPRINTS = ("weights_sha256", "ema_sha256", "state_sha256")


def config(pretraining: float | None, usual: float, pretrain: float = 0.5, **sections: Any) -> RunConfig:
    network = {"base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []}
    tree: dict[str, Any] = {
        "network": {**network, "dropout": usual, "condition": "none"},
        "objective": {
            "name": "ict",
            "pretrain": pretrain,
            "pretrain_dropout": pretraining,
            "ict": {"s1": 40},
            "refined": {"share": 0.5},
        },
        "train": {"steps": 16, "batch_size": 16, "torch_threads": 1},
        "store": {"kind": "gpu"},
        "checkpoint": {"every_steps": 5, "keep": 9},
        "sample": {"every_steps": 0, "final": 0},
    }
    return resolve(tree | sections)


def built(chosen: RunConfig, epochs: float = 8) -> tuple[Dropout, nn.Module]:
    objective = objectives.build(chosen, schedule.build(chosen.schedule), epochs, SHAPE)
    network = networks.for_run(chosen, SHAPE)
    return Dropout(chosen, objective, nn.Sequential(network)), network


def probabilities(network: nn.Module) -> set[float]:
    return {layer.p for layer in dropout_layers(network)}


@pytest.mark.parametrize(("pretraining", "usual"), [(0.13, 0.2), (0.0, 0.2), (0.1, 0.0)])
def test_each_phase_has_its_dropout_whatever_was_before(pretraining: float, usual: float) -> None:
    dropout, network = built(config(pretraining, usual))
    for epoch in (0, 3, 4, 7, 1, 4):
        dropout.start(2 * epoch, epoch, 0)
        assert probabilities(network) == {pretraining if epoch < 4 else usual}


def test_unset_is_the_same_dropout_in_all_phases_and_changes_no_bits(tmp_path: Path) -> None:
    dropout, network = built(config(None, 0.2))
    dropout.start(0, 0, 0)
    assert probabilities(network) == {0.2}
    same, other = (
        api.train(config(each, 0.2), IMAGES, run_dir=tmp_path / str(each), device="cpu") for each in (0.2, None)
    )
    assert [same[key] for key in FINGERPRINTS] == [other[key] for key in FINGERPRINTS]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapped_network_drops_with_the_probability_of_the_phase(compiled: bool) -> None:
    """A compiled network is compiled again for the other phase."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.75)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x)

    network: Any = torch.compile(Drops(), backend="eager") if compiled else nn.Sequential(Drops())
    chosen = config(0.25, 0.75)
    dropout = Dropout(chosen, objectives.build(chosen, schedule.build(chosen.schedule), 8, SHAPE), network)
    for epoch, dropped in ((0, 0.25), (4, 0.75), (1, 0.25)):
        dropout.start(epoch, epoch, 0)
        assert (network(torch.ones(20_000)) == 0).float().mean() == pytest.approx(dropped, abs=0.02)


def test_graphs_of_another_probability_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: how often the network is captured. benchmarks/gpu.py replays graphs."""

    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    captured: list[float] = []

    def capture(network: nn.Module, *_: object) -> None:
        captured.append(dropout_layers(network)[0].p)

    monkeypatch.setattr("udddm.backends.engines.graphs._Captured", capture)
    layer = nn.Dropout(0.1)
    graphed, x = GraphedNetwork(nn.Sequential(layer), copy_gradients=False), torch.ones(2, 3).as_subclass(OnGPU)
    for probability in (0.1, 0.1, 0.3, 0.3):
        layer.p = probability
        graphed._graph((x,))
        assert len(graphed._captured) == 1
    assert captured == [0.1, 0.3]


def test_a_run_resumes_bit_for_bit_in_either_phase(tmp_path: Path) -> None:
    chosen = config(0.1, 0.4)
    whole = api.train(chosen, IMAGES, run_dir=tmp_path / "whole", device="cpu")
    again = tmp_path / "again"
    api.train(chosen, IMAGES, run_dir=again, device="cpu")
    for step in (15, 5):  # in the objective, and in the pretraining
        (again / "result.json").unlink()
        for path in (again / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        resumed = api.train(chosen, IMAGES, run_dir=again, device="cpu")
        assert [resumed[key] for key in FINGERPRINTS] == [whole[key] for key in FINGERPRINTS]
    other = api.train(config(0.4, 0.4), IMAGES, run_dir=tmp_path / "other", device="cpu")
    assert other["weights_sha256"] != whole["weights_sha256"]


@pytest.mark.parametrize("settings", [{"pretrain": 0.0}, {"name": "edm"}])
def test_a_setting_that_would_be_ignored_is_refused(settings: dict[str, Any]) -> None:
    chosen = resolve({"objective": {"name": "ict", "pretrain": 0.5, "pretrain_dropout": 0.1, **settings}})
    with pytest.raises(ConfigError, match=r"pretrain_dropout=0\.1: this run pretrains no denoiser"):
        objectives.build(chosen, schedule.build(chosen.schedule), 8, SHAPE)


def test_a_network_without_dropout_layers_is_refused() -> None:
    chosen = config(0.1, 0.2)
    objective = objectives.build(chosen, schedule.build(chosen.schedule), 8, SHAPE)
    with pytest.raises(ConfigError, match=r"pretrain_dropout.*no layers torch\.nn\.Dropout"):
        Dropout(chosen, objective, nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.7)))
