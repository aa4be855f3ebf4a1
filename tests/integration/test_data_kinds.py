"""A run ends with the same weights, averages and state whatever kind of data set its images come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import udddm
from udddm.testing import image_sets

PIXELS = np.random.default_rng(4).integers(0, 256, (200, 3, 6, 6), dtype=np.uint8)
LABELS = np.arange(200) * 7 % 4
TINY: dict[str, Any] = {
    "network": {
        "base_channels": 4,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "classes": 4,
    },
    "objective": {"name": "ict", "refined": {"share": 0.5}},
    "train": {"steps": 5, "batch_size": 40, "ema": [0.9]},
    "checkpoint": {"every_steps": 5},
    "sample": {"every_steps": 0, "final": 0},
    "store": {"kind": "gpu"},
}


def test_every_kind_of_data_set_trains_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def fingerprints(run: str, dataset: Any = None, **data: Any) -> list[str | None]:
        tree = {**TINY, "data": data} if data else TINY
        result = udddm.train(tree, dataset, run_dir=tmp_path / "runs" / run, device="cpu")
        return [result.weights_sha256, result.ema_sha256, result.state_sha256]

    found = {"object": fingerprints("object", image_sets.rows(PIXELS, LABELS))}
    kinds = {kind: each for kind, each in image_sets.LOCAL.items() if kind not in ("deflated zip", "parquet")}
    for kind, (name, write) in kinds.items():
        (tmp_path / kind).mkdir()
        found[kind] = fingerprints(kind, name=name, path=write(str(tmp_path / kind), PIXELS, LABELS))
    assert len(found) == 7
    assert {kind for kind, each in found.items() if each != found["npz"]} == set()
