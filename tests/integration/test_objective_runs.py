"""Objectives in real runs that are stopped and resumed, and under torch.compile."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from udddm import api, networks, objectives
from udddm.config import RunConfig, resolve
from udddm.diffusion.schedule import build
from udddm.errors import ConfigError
from udddm.objectives.loss import visit_loss
from udddm.runs.result import TrainResult

SHAPE = (1, 4, 4)
DROPPING: dict[str, dict[str, Any]] = {
    "ict": {"name": "ict"},
    "ect": {"name": "ect", "pretrain": 0.0},
    "ect in chains": {"name": "ect", "pretrain": 0.0, "ect": {"length": 3}},
    "chain": {"name": "chain"},
    "long chain": {"name": "chain", "chain": {"length": 8}},
}
SMALL: dict[str, Any] = {
    "base_channels": 16,
    "channel_mult": [1, 2],
    "blocks_per_level": 1,
    "attention_resolutions": [2],
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] if name in ("ect in chains", "long chain") else [])
        for name, settings in {**DROPPING, "edm": {"name": "edm"}}.items()
    ],
)
def test_the_network_is_compiled_once_per_pass_without_graph_breaks(settings: dict[str, Any]) -> None:
    """For any number of rows that need a teacher, and any epochs, levels and classes."""
    graphs: list[object] = []
    backend = lookup_backend("aot_eager" if settings["name"] == "edm" else "eager")  # the latter compiles no backward

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return backend(graph, inputs)

    network = {**SMALL, "dropout": 0.1, "classes": 3}
    config = resolve({"objective": settings, "network": network, "train": {"steps": 1, "compile": True}})
    schedule = build(config.schedule)
    one = objectives.build(config, schedule, 40, SHAPE)
    teacher = objectives.teacher_of(config)
    torch._dynamo.reset()
    compiled = torch.compile(networks.for_run(config, SHAPE), backend=compiler, fullgraph=True)
    for epoch in range(0, 40, 2):
        ids = np.arange(16) + 16 * epoch
        x0 = torch.zeros(16, *SHAPE)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["name"] == "ict"):
            losses, _ = visit_loss(compiled, x0, x0, one.plan(ids, epoch), torch.from_numpy(ids % 3), teacher)
        losses.sum().backward()
    assert len(graphs) == (1 if settings["name"] == "edm" else 2)


TINY: dict[str, Any] = {
    "data": {"name": "digits"},
    "schedule": {"kind": "ve", "sigma_min": 0.05, "sigma_max": 30.0},
    "network": {
        "base_channels": 8,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "dropout": 0.1,
        "condition": "none",
    },
    "train": {"steps": 24, "batch_size": 128, "torch_threads": 1},  # 14 steps an epoch
    "sample": {"every_steps": 0},
    "checkpoint": {"every_steps": 10},
}


def resumed(config: RunConfig, run: Path) -> TrainResult:
    """The result of a copy of a finished run that lost its last checkpoint and continues from the one before."""
    copied = Path(shutil.copytree(run, run.with_name("resumed")))
    (copied / "result.json").unlink()
    newest = max((copied / "checkpoints").iterdir())
    (newest / "manifest.json").unlink()  # without a manifest this checkpoint is invalid
    return api.train(config, run_dir=copied, device="cpu")


@pytest.mark.parametrize("name", ["ict", "ect", "edm"])
def test_a_run_trains_and_resumes(tmp_path: Path, name: str) -> None:
    config = resolve(TINY | {"objective": {"name": name, "pretrain": 0.5}})
    whole = api.train(config, run_dir=tmp_path / "whole", device="cpu")
    assert math.isfinite(whole["epochs"]) and whole["steps"] == 24
    again = resumed(config, tmp_path / "whole")
    assert again["weights_sha256"] == whole["weights_sha256"] and again["state_sha256"] == whole["state_sha256"]


def labeled(name: str = "chain", share: float = 0.2, seed: int = 0, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "seed": seed,
        "network": {
            "base_channels": 8,
            "channel_mult": [1],
            "blocks_per_level": 1,
            "attention_resolutions": [],
            "dropout": 0.1,
            "classes": 10,
        },
        "objective": {"name": name},
        "train": {"steps": 24, "batch_size": 128, "torch_threads": 1},
        "sample": {"every_steps": 0},
    }
    for key, values in sections.items():
        tree[key] = {**tree.get(key, {}), **values}
    tree["network"]["label_dropout"] = share
    return resolve(tree)


def test_a_run_with_label_dropout_resumes_and_differs_from_one_without(tmp_path: Path) -> None:
    chosen = labeled(network={"condition": "none"}, checkpoint={"every_steps": 10})
    whole = api.train(chosen, run_dir=tmp_path / "whole", device="cpu")
    again = resumed(chosen, tmp_path / "whole")
    for key in ("weights_sha256", "ema_sha256", "state_sha256"):
        assert again[key] == whole[key]
    plain = api.train(labeled(share=0, network={"condition": "none"}), run_dir=tmp_path / "plain", device="cpu")
    assert plain["weights_sha256"] != whole["weights_sha256"]

    model = api.load_model(tmp_path / "whole", ema="none")
    one, two, three = (api.sample(model, range(6), labels=[3] * 6, guidance=w) for w in (1.0, 2.0, 3.0))
    np.testing.assert_allclose((three - two)[abs(three) < 1], (two - one)[abs(three) < 1], atol=1e-4)
    assert not np.array_equal(one, two)
    with pytest.raises(ConfigError, match=r"guidance 2: the network was not trained.*network.label_dropout"):
        api.sample(tmp_path / "plain", [0], guidance=2)
