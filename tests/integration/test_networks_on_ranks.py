"""A network with a buffer on two ranks, which evaluate their teachers in different steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import udddm
from udddm.runs.weights import Saved

SETTINGS: dict[str, Any] = {
    "network": {"name": "dit", "settings": {"width": 16, "depth": 1, "heads": 2}, "dropout": 0.0, "condition": "none"},
    "objective": {"name": "ect", "pretrain": 0.0},
    "order": {"lanes": 2},
    "train": {"steps": 12, "batch_size": 2, "learning_rate": 1e-3, "ema": [0.9]},
    "checkpoint": {"every_steps": 12},
    "sample": {"every_steps": 0},
}


@pytest.mark.timeout(120)
def test_ranks_that_call_the_network_unequally_often_agree_with_one(forked_workers: None, tmp_path: Path) -> None:
    """DDP exchanges the positions of a DiT; the ranks must not wait for each other in a call that one of them omits."""
    found = []
    for workers in (1, 2):
        udddm.train(SETTINGS, run_dir=tmp_path / str(workers), device="cpu", workers=workers)
        found.append(Saved(tmp_path / str(workers) / "checkpoints" / "step-00000012", "model"))
    one, two = found
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
