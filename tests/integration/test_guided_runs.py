"""Guidance that is trained in, in real runs: resumed bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udddm import api
from udddm.config import RunConfig
from udddm.data import ArrayImages
from udddm.testing.runs import FINGERPRINTS, reopen, small_run

IMAGES = ArrayImages(
    np.random.default_rng(0).integers(0, 256, (64, 1, 4, 4), dtype=np.uint8), np.arange(64) % 10, classes=10
)


def guided(kind: str, **train: Any) -> RunConfig:
    objective = {
        "name": kind,
        "ict": {"s1": 40},
        "guidance": 2.0,
        "pretrain": 0.25,
        "refined": {"share": 0.4, "start": 0.25},
    }
    sections = {"train": {"steps": 16, "batch_size": 32, "torch_threads": 1, **train}, "checkpoint": {"every_steps": 6}}
    return small_run(objective, {"classes": 10, "label_dropout": 0.25}, **sections)


@pytest.mark.parametrize(
    ("kind", "train"), [("ict", {}), ("ect", {"precision": "bf16", "grad_accumulation": 2})], ids=["ict", "ect"]
)
def test_a_guided_run_resumes_bit_for_bit(tmp_path: Path, kind: str, train: dict[str, Any]) -> None:
    """Through a guided denoiser, then guided with refined pairs; the second run with autocast and micro-batches."""
    whole = api.train(guided(kind, **train), IMAGES, run_dir=tmp_path / "whole", device="cpu")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    reopen(again)
    resumed = api.train(guided(kind, **train), IMAGES, run_dir=again, device="cpu")
    assert [resumed[key] for key in FINGERPRINTS] == [whole[key] for key in FINGERPRINTS]
