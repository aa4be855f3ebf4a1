"""MLflow. Its environment variables apply: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and others."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from udddm import image_grid
from udddm.errors import ConfigError
from udddm.training import loggers
from udddm.training.callbacks import Callback, RunInfo

TAG = "udddm.run"
"""The tag of a run of MLflow that holds the id of ours, by which a run that resumes finds it."""
LONGEST = 500
"""Characters of a parameter's value, MLflow's limit before version 2.10."""


class MLflow(Callback):
    """Logs to the experiment `udddm`, or to that of MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI.

    Without MLFLOW_TRACKING_URI, it writes files to `<run>/mlruns`, which `mlflow ui --backend-store-uri` shows. A run
    that resumes goes on in the same run of MLflow.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError("loggers: mlflow is not installed: pip install 'udddm[mlflow]'")

    def on_start(self, run: RunInfo) -> None:
        from mlflow import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI")
        if where is None:
            where = (run.path / "mlruns").resolve().as_uri()
        if where.startswith("file:"):  # without it, recent versions refuse what needs no server and no database
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(where)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "udddm")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            title = run.where.rstrip("/").rpartition("/")[2]
            self._id = self._client.create_run(experiment, run_name=title, tags={TAG: run.id}).info.run_id
            self._log_parameters(run.config.model_dump(mode="json"))

    def _log_parameters(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        found = [Param(key, str(value)[:LONGEST]) for key, value in _flat(config)]
        for start in range(0, len(found), 100):  # MLflow's limit for one request
            self._client.log_batch(self._id, params=found[start : start + 100])

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, loggers.grouped(metrics))

    def on_images(self, step: int, images: torch.Tensor) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"step-{step:08d}.png"
            image_grid.save_image_grid(images, file)
            self._client.log_artifact(self._id, str(file), "samples")

    def on_scores(self, step: int, scores: Mapping[str, Any]) -> None:
        self._log(step, loggers.scalars(scores))

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        self._client.set_terminated(self._id, "FINISHED" if result is not None else "KILLED")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of a configuration, as (key with dots, value)."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
