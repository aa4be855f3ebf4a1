"""Refined pairs in real runs: the same result with every store, and after a run is resumed with another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udddm import api
from udddm.config import RunConfig, resolve
from udddm.data import ArrayImages

IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (64, 1, 4, 4), dtype=np.uint8))
FINGERPRINTS = ("weights_sha256", "ema_sha256", "state_sha256")


def refined(kind: str, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "schedule": {"kind": "ve", "sigma_min": 0.05, "sigma_max": 30.0},
        "network": {
            "base_channels": 8,
            "channel_mult": [1],
            "blocks_per_level": 1,
            "attention_resolutions": [],
            "dropout": 0.1,
            "condition": "none",
        },
        "objective": {"name": kind, "pretrain": 0.25, "ict": {"s1": 40}, "refined": {"share": 0.5}},
        "train": {"steps": 32, "batch_size": 32, "torch_threads": 1},
        "checkpoint": {"every_steps": 11},
        "log_every_steps": 4,
        "sample": {"every_steps": 0},
    }
    return resolve(tree | sections)


@pytest.mark.parametrize("kind", ["ict", "ect"])
def test_a_run_resumes_bit_for_bit_with_another_store(tmp_path: Path, kind: str) -> None:
    whole = api.train(refined(kind, store={"kind": "gpu"}), IMAGES, run_dir=tmp_path / "whole", device="cpu")
    again = tmp_path / "again"
    api.train(refined(kind, store={"kind": "pinned"}), IMAGES, run_dir=again, device="cpu")
    (again / "result.json").unlink()
    (max((again / "checkpoints").iterdir()) / "manifest.json").unlink()  # invalid: the previous one is used
    resumed = api.train(refined(kind, store={"kind": "zarr"}), IMAGES, run_dir=again, device="cpu")
    assert [resumed[key] for key in FINGERPRINTS] == [whole[key] for key in FINGERPRINTS]

    off = refined(kind, objective={"name": kind, "pretrain": 0.25, "ict": {"s1": 40}})
    plain = api.train(off, IMAGES, run_dir=tmp_path / "plain", device="cpu")
    assert plain["weights_sha256"] != whole["weights_sha256"]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    fractions = {line["step"]: line["refined_fraction"] for line in lines}
    assert fractions[4] == fractions[8] == 0  # the denoiser of the first two epochs
    assert 0.1 < max(fractions.values()) < 0.5
