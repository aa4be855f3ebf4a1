"""Loggers: callbacks that pass metrics, pictures and scores on to TensorBoard, Weights & Biases and MLflow.

metrics.jsonl and evaluation.jsonl, which every run writes, need no logger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

SPEED = ("images_per_second", "data_wait_fraction", "elapsed_seconds", "eta_seconds", "gpu_memory_bytes")
POSITION = ("epoch", "images")


def group(name: str) -> str:
    """The name of a metric with its group, as the pages of loggers sort them: `loss` is `train/loss`."""
    if name.startswith("store_"):
        return f"store/{name.removeprefix('store_')}"
    if name in SPEED:
        return f"speed/{name}"
    if name in POSITION:
        return f"position/{name}"
    return f"train/{name}"


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under their names with groups."""
    return {group(name): float(value) for name, value in metrics.items()}


def scalars(scores: Mapping[str, Any], group: str = "scores") -> dict[str, float]:
    """The finite numbers among the scores of an evaluation, in the group `scores`.

    Those of further feature networks are in a group per network, such as `scores/dinov2`.
    """
    found = {name: value for name, value in scores.items() if name not in ("step", "n", "evaluations")}
    numbers = {
        f"{group}/{name}": float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
    for network, others in scores.get("networks", {}).items():
        numbers |= scalars(others, f"{group}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', network)}")
    return numbers
