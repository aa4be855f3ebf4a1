"""The metric `store_age_ratio` in real runs, and its warning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from udddm import api
from udddm.config import resolve
from udddm.data import ArrayImages

IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (64, 1, 4, 4), dtype=np.uint8))


def test_it_is_measured_once_per_report_and_does_not_change_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    for every in (4, 1000):
        config = resolve(
            {
                "network": {
                    "base_channels": 8,
                    "channel_mult": [1],
                    "blocks_per_level": 1,
                    "attention_resolutions": [],
                    "condition": "none",
                    "dropout": 0.2,
                },
                "objective": {"name": "chain", "chain": {"length": 4}},
                "train": {"steps": 16, "batch_size": 32, "torch_threads": 1, "learning_rate": 0.01},
                "log_every_steps": every,
                "sample": {"every_steps": 0},
            }
        )
        run = tmp_path / str(every)
        found[every] = api.train(config, IMAGES, run_dir=run, device="cpu").weights_sha256
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        ratios = [line.get("store_age_ratio") for line in lines]
        assert len(ratios) == (4 if every == 4 else 1)
        if every == 4:
            assert all(ratio is not None and ratio > 0 for ratio in ratios[1:])  # the first epoch reads nothing
    assert found[4] == found[1000]
    warnings = [message for message in caplog.messages if "store_age_ratio" in message]
    assert len(warnings) == 1 and "refined pairs" in warnings[0]
