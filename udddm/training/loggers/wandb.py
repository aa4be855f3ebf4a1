"""Weights & Biases. Its environment variables apply: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY and others."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch

from udddm import image_grid
from udddm.errors import ConfigError
from udddm.training import loggers
from udddm.training.callbacks import Callback, RunInfo


class WeightsAndBiases(Callback):
    """Logs to the project `udddm`, or to that of WANDB_PROJECT; its files are in `<run>/wandb`.

    A run that resumes goes on in the same run of Weights & Biases. Steps that a killed run repeats are logged again,
    under the same `step`.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("loggers: wandb is not installed: pip install 'udddm[wandb]'")

    def on_start(self, run: RunInfo) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "udddm"),
            id=os.environ.get("WANDB_RUN_ID", run.id),
            name=os.environ.get("WANDB_NAME", run.where.rstrip("/").rpartition("/")[2]),
            resume="allow",
            dir=str(run.path),
            config=run.config.model_dump(mode="json"),
            # It would replace standard output and error.
            settings=wandb.Settings(console="off", disable_git=True, silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **loggers.grouped(metrics)})

    def on_images(self, step: int, images: torch.Tensor) -> None:
        self._run.log({"step": step, "samples": self._image(image_grid.pixels(images))})

    def on_scores(self, step: int, scores: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **loggers.scalars(scores)})

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        for name, value in (result or {}).items():
            self._run.summary[f"result/{name}"] = value
        self._run.finish(exit_code=0 if result is not None else 1)
