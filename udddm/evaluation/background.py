"""Evaluation during training: samples are drawn between two steps, and scored in a background thread."""

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
from udddm.files import write_text
from udddm.log import log


class BackgroundEvaluation:
    """Writes scores to `<run>/evaluation.jsonl`, one line per step, and to the log.

    Raises ConfigError if the feature network cannot be loaded.
    """

    def __init__(self, config: EvaluateConfig, dataset: ImageDataset, device: torch.device, run_dir: Path):
        check_channels(config.features, dataset.shape[0])
        self._network, self._metrics = load_features(config.features, device), config.metrics
        self._dataset, self._path = dataset, run_dir / "evaluation.jsonl"
        self._reference: Reference | None = None
        # A new thread's current device is the first GPU unless it is set.
        choose = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "evaluation", initializer=choose)
        self._pending: list[Future[None]] = []

    def submit(self, step: int, images: torch.Tensor, evaluations: int) -> None:
        """Queue an evaluation of `images` [N, C, H, W], drawn with `evaluations` network evaluations, and return.

        Raises the error of an earlier evaluation that failed.
        """
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
        same = (step, evaluations)  # written before the run was resumed from an earlier step
        kept = [line for line in lines if (line["step"], line["evaluations"]) != same]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in [*kept, found]))
        shown = (f"{name} {found[name]:.4g}" for name in ("fid", "fd", "kid", "recall", "spread") if name in found)
        log.info(f"step {step}: {found['n']} images scored: {', '.join(shown) or 'see evaluation.jsonl'}")
        for note in evaluate.notes(found):
            log.info(note)

    def close(self) -> None:
        """Wait for the queued evaluations. Raises the error of one that failed."""
        self._pool.shutdown()
        for future in self._pending:
            future.result()
