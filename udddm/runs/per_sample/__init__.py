"""The stores of this package in any PyTorch loop: `udddm.PerSampleState` (docs/per-sample.md)."""

from __future__ import annotations

from udddm.runs.per_sample.state import PerSampleState, StateBatchSampler

__all__ = ["PerSampleState", "StateBatchSampler"]
