"""Small runs for tests of what training does, and how it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from udddm.config import RunConfig, resolve

FINGERPRINTS = ("weights_sha256", "ema_sha256", "state_sha256")
"""The keys of a result that equal runs share."""


def small_run(objective: dict[str, Any], network: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """A configuration for images of a few pixels: a U-Net of one level with dropout, and batches of 32.

    `network` adds to that section, and each of `sections` replaces one.
    """
    tree: dict[str, Any] = {
        "schedule": {"kind": "ve", "sigma_min": 0.05, "sigma_max": 30.0},
        "network": {
            "base_channels": 8,
            "channel_mult": [1],
            "blocks_per_level": 1,
            "attention_resolutions": [],
            "dropout": 0.1,
            "condition": "none",
            **(network or {}),
        },
        "objective": objective,
        "train": {"steps": 32, "batch_size": 32, "torch_threads": 1},
        "checkpoint": {"every_steps": 11},
        "log_every_steps": 4,
        "sample": {"every_steps": 0},
        "loggers": [],
    }
    return resolve(tree | sections)


def reopen(run: Path) -> None:
    """Make a finished run resume from its second newest checkpoint: the newest one becomes invalid."""
    (run / "result.json").unlink()
    (max((run / "checkpoints").iterdir()) / "manifest.json").unlink()
