"""Short ways to write a setting: `lr=3e-4`, `objective=ict`, `train.ema=0.9,0.99`."""

from __future__ import annotations

from typing import Any

ALIASES = {
    "batch_size": "train.batch_size",
    "classes": "network.classes",
    "compile": "train.compile",
    "dropout": "network.dropout",
    "ema": "train.ema",
    "epochs": "train.epochs",
    "flip": "data.flip",
    "grad_accumulation": "train.grad_accumulation",
    "grad_clip": "train.grad_clip",
    "init_from": "train.init_from",
    "learning_rate": "train.learning_rate",
    "lr": "train.learning_rate",
    "lr_schedule": "train.lr_schedule",
    "optimizer": "train.optimizer",
    "precision": "train.precision",
    "sigma_data": "schedule.sigma_data",
    "sigma_max": "schedule.sigma_max",
    "sigma_min": "schedule.sigma_min",
    "steps": "train.steps",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
}
"""Dotted key by the short name that an override may use instead."""
SELECTORS = {
    "data": "name",
    "engine": "name",
    "network": "name",
    "objective": "name",
    "schedule": "kind",
    "store": "kind",
}
"""The key of a section that a plain name sets: `objective=ict` is `objective.name=ict`."""


def selected(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of plain values with names instead of sections, `{objective: ict}`, written out."""
    return {
        key: {SELECTORS[key]: value} if key in SELECTORS and isinstance(value, str) else value
        for key, value in tree.items()
    }
