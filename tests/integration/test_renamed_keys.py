"""A run from before keys were renamed resumes with bit-for-bit equal results."""

from __future__ import annotations

import logging
import tarfile
from pathlib import Path

import pytest

import udddm
from udddm.config.renamed import RENAMED, current_key

ARCHIVE = Path(__file__).parent / "data" / "run-before-renames.tar.gz"
"""24 steps of digits, killed after step 13 with a checkpoint at step 10 (the commit before the renames: d29d9a8)."""
OLD_NAMES = [
    "network={width: 4, multipliers: [1], blocks: 1, attention: [], head_width: 8, dropout: 0.1, "
    "condition: cross-attention, classes: 10, label_dropout: 0.1}",
    "train={steps: 24, batch_size: 256, threads: 1, accumulation: 2, clip: 1.0, decay: cosine, ema: [0.9], "
    "ema_warmup: true, power_ema: [0.1], power_ema_every_steps: 8, learning_rate: 0.002}",
    "objective={name: tuning, warmup: 0.2, tuning: {length: 2, stages: 2, mean: -1.0, deviation: 1.8}}",
    "process={kind: ve, sigma_min: 0.05, sigma_max: 30.0}",
    "store={kind: zarr, on_damage: stop}",
    "checkpoint.every_steps=10",
    "log_every_steps=5",
    "sample={every_steps: 0, final: 0}",
    # A section given by --set was replaced then, and is merged with the preset now.
    "objective.refined.share=0",
    "network.patch=1",
    "process.sigma_data=0.5",
    "train.betas=[0.9, 0.999]",
    "train.warmup_steps=0",
]


def test_a_run_from_before_the_renames_resumes_bit_for_bit(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    config = udddm.load_config("digits", OLD_NAMES)
    resumed = udddm.train(config, run_dir=tmp_path / "begun", device="cpu")
    undisturbed = udddm.train(config, run_dir=tmp_path / "undisturbed", device="cpu")
    for what in ("weights_sha256", "ema_sha256", "state_sha256"):
        assert resumed[what] == undisturbed[what], what


def test_a_model_with_old_names_is_sampled_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setattr(logging.getLogger("udddm"), "propagate", True)
    with caplog.at_level(logging.WARNING, "udddm"):
        images = udddm.sample(tmp_path / "begun", range(3))
    assert images.shape == (3, 1, 8, 8)
    warnings = [record.getMessage() for record in caplog.records if "old names" in record.getMessage()]
    assert len(warnings) == 1
    for old, new in (
        ("process", "schedule"),
        ("network.width", "network.base_channels"),
        ("train.clip", "train.grad_clip"),
    ):
        assert f"{old} is now {new}" in warnings[0]


@pytest.mark.parametrize("old", list(RENAMED))
def test_every_old_key_has_a_new_one_that_exists(old: str) -> None:
    tree = udddm.RunConfig().model_dump()
    for part in current_key(old).split("."):
        assert part in tree, old
        tree = tree[part]
