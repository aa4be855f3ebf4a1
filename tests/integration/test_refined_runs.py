"""Refined pairs in real runs: the same result with every store, and after a run is resumed with another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udddm import api
from udddm.config import RunConfig
from udddm.data import ArrayImages
from udddm.testing.runs import FINGERPRINTS, reopen, small_run

IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (64, 1, 4, 4), dtype=np.uint8))


def refined(kind: str, **sections: Any) -> RunConfig:
    return small_run({"name": kind, "pretrain": 0.25, "ict": {"s1": 40}, "refined": {"share": 0.5}}, **sections)


@pytest.mark.parametrize("kind", ["ict", "ect"])
def test_a_run_resumes_bit_for_bit_with_another_store(tmp_path: Path, kind: str) -> None:
    whole = api.train(refined(kind, store={"kind": "gpu"}), IMAGES, run_dir=tmp_path / "whole", device="cpu")
    again = tmp_path / "again"
    api.train(refined(kind, store={"kind": "pinned"}), IMAGES, run_dir=again, device="cpu")
    reopen(again)
    resumed = api.train(refined(kind, store={"kind": "zarr"}), IMAGES, run_dir=again, device="cpu")
    assert [resumed[key] for key in FINGERPRINTS] == [whole[key] for key in FINGERPRINTS]

    off = small_run({"name": kind, "pretrain": 0.25, "ict": {"s1": 40}})
    plain = api.train(off, IMAGES, run_dir=tmp_path / "plain", device="cpu")
    assert plain["weights_sha256"] != whole["weights_sha256"]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    fractions = {line["step"]: line["refined_fraction"] for line in lines}
    assert fractions[4] == fractions[8] == 0  # the denoiser of the first two epochs
    assert 0.1 < max(fractions.values()) < 0.5
