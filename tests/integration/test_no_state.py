"""Runs whose objective does not read the x0-state keep none, with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udddm import api
from udddm.cli import store as store_command
from udddm.config import RunConfig, resolve
from udddm.data import ArrayImages
from udddm.errors import ConfigError
from udddm.objectives.ict import ICT
from udddm.testing.runs import reopen

IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (64, 1, 4, 4), dtype=np.uint8))


def config(objective: dict[str, Any], store: dict[str, Any]) -> RunConfig:
    return resolve(
        {
            "network": {
                "base_channels": 8,
                "channel_mult": [1],
                "blocks_per_level": 1,
                "attention_resolutions": [],
                "condition": "none",
            },
            "objective": objective,
            "store": store,
            "train": {"steps": 9, "batch_size": 16, "torch_threads": 1, "grad_accumulation": 2},
            "checkpoint": {"every_steps": 6},
            "sample": {"every_steps": 0},
        }
    )


def test_nothing_is_kept_and_the_weights_are_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen, run = config({"name": "ict"}, {"kind": "zarr"}), tmp_path / "run"
    with caplog.at_level("INFO", "udddm"):
        found = api.train(chosen, IMAGES, run_dir=run, device="cpu")
    assert "x0-state store: none, because ict does not read the state; store.kind=zarr is not used" in caplog.messages
    assert not (run / "state").exists()
    for checkpoint in (run / "checkpoints").iterdir():
        assert [path.name for path in (checkpoint / "state").iterdir()] == ["snapshot.json"]

    reopen(run)
    resumed = api.train(chosen, IMAGES, run_dir=run, device="cpu")
    assert resumed["weights_sha256"] == found["weights_sha256"] and resumed["ema_sha256"] == found["ema_sha256"]

    for command, code in (("info", 0), ("verify", 0), ("view", 1), ("convert", 1)):
        more = {"view": ["--sample", "3", "--out", str(tmp_path / "v.png")], "convert": [str(tmp_path / "to")]}
        assert store_command.main([command, str(run), *more.get(command, [])]) == code
        said = capsys.readouterr()
        if command != "verify":
            assert "does not read it" in said.out + said.err
    assert not (tmp_path / "to").exists()

    build = ICT.create

    def reading(context: Any) -> ICT:
        made = build(context)
        made.reads_state = True
        return made

    monkeypatch.setattr(ICT, "create", reading)
    kept = api.train(chosen, IMAGES, run_dir=tmp_path / "kept", device="cpu")
    assert (tmp_path / "kept" / "state").exists()
    assert kept["weights_sha256"] == found["weights_sha256"] and kept["ema_sha256"] == found["ema_sha256"]
    # A run that was begun with a store goes on without one.
    monkeypatch.undo()
    (tmp_path / "kept" / "result.json").unlink()
    (max((tmp_path / "kept" / "checkpoints").iterdir()) / "manifest.json").unlink()
    again = api.train(chosen, IMAGES, run_dir=tmp_path / "kept", device="cpu")
    assert again["weights_sha256"] == found["weights_sha256"]


@pytest.mark.parametrize(
    ("objective", "reads"),
    [
        ({"name": "edm"}, False),
        ({"name": "ict"}, False),
        ({"name": "ict", "refined": {"share": 0.5}}, True),
        ({"name": "ict", "refined": {"share": 0.5, "source": "network"}}, False),
        ({"name": "ect", "pretrain": 0.5}, False),
        ({"name": "ect", "ect": {"length": 2}}, True),
        ({"name": "ect", "refined": {"share": 0.5}}, True),
        ({"name": "chain"}, True),
        ({"name": "chain", "chain": {"length": 1}}, False),
        ({"name": "chain", "chain": {"length": "trajectory"}}, True),
    ],
)
def test_a_store_that_keeps_nothing_is_refused_if_the_objective_reads_the_state(
    tmp_path: Path, objective: dict[str, Any], reads: bool
) -> None:
    chosen = config(objective, {"kind": "none"})
    if not reads:
        api.train(chosen, IMAGES, run_dir=tmp_path / "run", device="cpu")
        return
    with pytest.raises(ConfigError, match=r"store.kind=none keeps no state, and the objective reads it: choose gpu"):
        api.train(chosen, IMAGES, run_dir=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "run.json").exists()
