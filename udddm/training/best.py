"""The best weights of a run by a score, which is known only some steps after they were drawn from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from udddm.config import RunConfig
from udddm.files import atomic_save, make_directory, write_json
from udddm.log import Dispensable, log
from udddm.training.callbacks import Callback, RunInfo

HIGHER = ("recall", "precision", "inception_score")
"""Scores of which a higher one is better."""
SCORES = "scores.json"
WAITING = ".best"
"""Subdirectory of a run for the weights whose scores are not known yet."""


class Best(Callback):
    """Keeps `<run>/best`: the weights with the best score so far, and their scores. `load_model` reads the directory.

    A full disk is reported once, and training goes on without it.
    """

    def __init__(self, run: Path, config: RunConfig, shape: tuple[int, int, int]):
        self._directory, self._waiting = run / "best", run / WAITING
        self._config, self._shape, self._score = config, shape, config.checkpoint.best or ""
        self._output = Dispensable("the best weights")
        self._known: float | None = None

    def on_start(self, run: RunInfo) -> None:
        self._known = self._read()
        shutil.rmtree(self._waiting, ignore_errors=True)  # of a process that was killed

    def _read(self) -> float | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads((self._directory / SCORES).read_text())[self._score])
        return None

    def _candidate(self, step: int) -> Path:
        return self._waiting / f"step-{step:08d}.safetensors"

    def offer(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep the weights of a step until its scores are known."""
        with self._output.attempt():
            make_directory(self._waiting)
            tensors = {name: value.detach().contiguous() for name, value in weights.items()}
            atomic_save(self._candidate(step), lambda path: save_file(tensors, path, metadata={"step": str(step)}))

    def on_scores(self, step: int, scores: Mapping[str, Any]) -> None:
        """Keep the weights of a step if its scores are better than all before, and drop them otherwise."""
        candidate, value = self._candidate(step), scores.get(self._score)
        if value is None:
            log.warning(f"checkpoint.best={self._score}: step {step} has no such score; it has {', '.join(scores)}")
        better = isinstance(value, (int, float)) and math.isfinite(value) and self._improves(float(value))
        with self._output.attempt():
            if not candidate.exists():
                return
            if not better:
                candidate.unlink()
                return
            averages = self._config.train.averages
            make_directory(self._directory)
            name = f"ema-{averages[0]}.safetensors" if averages else "model.safetensors"
            settings = {"config": self._config.model_dump(mode="json"), "shape": list(self._shape)}
            write_json(self._directory / "config.json", settings)
            candidate.replace(self._directory / name)
            write_json(self._directory / SCORES, dict(scores))
            self._known = float(value)  # type: ignore[arg-type]
            log.info(
                f"step {step} has the best {self._score} so far, {value:.4g}: its weights are in {self._directory}"
            )

    def _improves(self, value: float) -> bool:
        if self._known is None:
            return True
        return value > self._known if self._score in HIGHER else value < self._known
