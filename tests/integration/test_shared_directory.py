"""Ranks on several machines that share a directory, which a network file system may list with outdated content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import udddm
from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig, load_config
from udddm.files import load_json
from udddm.runs.checkpoint import Checkpoints, corruption
from udddm.testing.ranks import on_ranks
from udddm.tools import inspect
from udddm.training.rank import train_rank

SETTINGS = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.0, condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 50, batch_size: 128, ema: [0.99]}",  # three epochs of 15 steps, and five steps
    "checkpoint={every_steps: 10, keep: 2}",
    "sample.every_steps=0",
]


def config(*more: str) -> RunConfig:
    return load_config(None, [*SETTINGS, *more])


class Training:
    """A run in which the second rank sees no checkpoint yet, and the first none of the second's files."""

    def __init__(self, settings: RunConfig, run: Path):
        self.settings, self.run = settings, run

    def __call__(self, ranks: Ranks) -> None:
        if ranks.is_rank_zero:
            listed = Path.rglob
            Path.rglob = lambda path, pattern: (p for p in listed(path, pattern) if "-00002-of-" not in p.name)  # type: ignore
        else:
            Checkpoints.all = lambda kept: []  # type: ignore[method-assign]
        train_rank(self.settings, None, self.run, ranks)


@pytest.mark.parametrize("kind", ["zarr", "gpu"])
def test_the_first_ranks_listing_decides_which_checkpoints_are_kept(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(f"store.kind={kind}")
    on_ranks(2, tmp_path, Training(settings, run))
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["step-00000040", "step-00000050"]
    for path in checkpoints:
        assert corruption(path) is None
        named: dict[str, Any] = load_json(path / "manifest.json")
        assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == {*named, "manifest.json"}
    assert inspect.verify(inspect.find(str(run)))[1] == []
    shutil.rmtree(checkpoints[-1])
    (run / "result.json").unlink()
    assert udddm.train(settings, run_dir=run, device="cpu")["steps"] == 50
