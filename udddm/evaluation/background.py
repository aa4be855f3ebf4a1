"""Evaluation during training: samples are made between two steps; all the rest happens in a background thread."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from udddm.config import EvaluateConfig
from udddm.data import ImageDataset
from udddm.evaluation import evaluate
from udddm.evaluation.features import check_channels, extract, load_features
from udddm.evaluation.metrics import Reference
from udddm.log import log


class BackgroundEvaluation:
    """Scores go to `<run>/evaluation.jsonl`, one line a step, and to the run's messages.

    Raises ConfigError for a feature network that cannot be had.
    """

    def __init__(self, config: EvaluateConfig, dataset: ImageDataset, device: torch.device, run: Path):
        check_channels(config.features, dataset.shape[0])
        self._network, self._metrics = load_features(config.features, device), config.metrics
        self._dataset, self._path = dataset, run / "evaluation.jsonl"
        self._reference: Reference | None = None
        choose = (
            partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        )  # else a thread's is the first
        self._pool = ThreadPoolExecutor(1, "evaluation", initializer=choose)
        self._pending: list[Future[None]] = []

    def submit(self, step: int, images: torch.Tensor, evaluations: int) -> None:
        """Returns at once. Raises what an earlier evaluation failed with."""
        for done in [future for future in self._pending if future.done()]:
            self._pending.remove(done)
            done.result()
        self._pending.append(self._pool.submit(self._score, step, images, evaluations))

    def _score(self, step: int, images: torch.Tensor, evaluations: int) -> None:
        if self._reference is None:
            self._reference = evaluate.reference(self._dataset, self._network)
        rows = extract(self._network, torch.split(images, evaluate.BATCH))
        found: dict[str, Any] = {"step": step, "evaluations": evaluations}
        found |= evaluate.score(*rows, self._reference, self._network.name, self._metrics)
        lines = [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
        same = (step, evaluations)  # of a run that was resumed from before it
        kept = [line for line in lines if (line["step"], line["evaluations"]) != same]
        temporary = self._path.with_name(self._path.name + ".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*kept, found]))
        temporary.replace(self._path)
        distance = "fid" if "fid" in found else "fd"
        log.info(f"step {step}: {distance} {found[distance]:.4g} on {found['n']} images, recall {found['recall']:.2f}")
        for note in evaluate.notes(found):
            log.info(note)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()
        for future in self._pending:
            future.result()
