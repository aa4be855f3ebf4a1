"""Evaluation during training: samples are drawn between two steps, and scored in a background thread."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.config import EvaluateConfig, RunConfig
from udddm.data import ImageDataset
from udddm.errors import ConfigError, DataError
from udddm.evaluation import evaluate
from udddm.evaluation.features import FeatureNetwork, check_channels, extract_each, load_features
from udddm.evaluation.metrics import Reference
from udddm.evaluation.reference import read_reference
from udddm.files import write_text
from udddm.log import Dispensable, log
from udddm.storage.threads import Worker

WAITING = 8
"""The maximum number of evaluations that wait for their turn."""
WAITING_BYTES = 256 << 20
"""The maximum size of the images of waiting evaluations. A single one may be larger."""
PATIENCE = 5.0
"""Seconds that `cancel` waits for the evaluation in progress."""


class BackgroundEvaluation:
    """Writes scores to `<run>/evaluation.jsonl`, one line per step, and to the log.

    Raises ConfigError if a feature network cannot be loaded, DataError if `evaluate.reference` cannot be read.
    """

    def __init__(self, config: EvaluateConfig, dataset: ImageDataset, device: torch.device, run_dir: Path):
        for name in config.features:
            check_channels(name, dataset.shape[0])
        self._networks = [load_features(name, device, config.weights) for name in config.features]
        self._dataset, self._path = dataset, run_dir / "evaluation.jsonl"
        self._file = None if config.reference is None else read_reference(config.reference)
        chosen = None if config.metrics == type(config).model_fields["metrics"].default else config.metrics
        self._metrics = evaluate.applicable(chosen, self._file)
        if self._file is not None:
            for network in self._networks:
                evaluate.check_reference(self._file, network, dataset.shape)
        self._references: list[Reference] = []
        choose = partial(_use_own_stream, device) if device.type == "cuda" else None
        self._worker = Worker("evaluation", choose)
        self._pending: dict[Future[None], tuple[int, int]] = {}  # the step, and the bytes of its images
        self._cancelled = threading.Event()
        self._skipped = 0
        self._output = Dispensable("evaluation.jsonl")
        self._unwritten: list[dict[str, Any]] = []
        self._found: deque[dict[str, Any]] = deque()

    def accepts(self, step: int) -> bool:
        """Whether another evaluation may be queued. If not, the step is skipped, with a message at the first time.

        Raises the error of an earlier evaluation that failed.
        """
        self._raise_failure()
        waiting = [size for future, (_, size) in self._pending.items() if not future.running()]
        if len(waiting) < WAITING and (len(waiting) < 2 or sum(waiting) < WAITING_BYTES):
            return True
        self._skipped += 1
        if self._skipped == 1:
            log.warning(
                f"step {step} is not scored, because {len(waiting)} earlier evaluations are waiting: scoring is slower "
                "than training. Raise evaluate.every_steps or lower evaluate.count. Only the total of further skipped "
                "evaluations is reported, at the end"
            )
        return False

    def submit(self, step: int, images: torch.Tensor, evaluations: int) -> None:
        """Queue an evaluation of `images` [N, C, H, W], drawn with `evaluations` network evaluations, and return."""
        future = self._worker.submit(partial(self._score, step, images, evaluations))
        self._pending[future] = (step, images.nbytes)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the queued evaluations. Returns whether all of them are done.

        Raises the error of one that failed.
        """
        wait(self._pending, seconds)
        self._raise_failure()
        return not self._pending

    def take(self) -> list[dict[str, Any]]:
        """The scores found since the last call, as in evaluation.jsonl."""
        return [self._found.popleft() for _ in range(len(self._found))]

    def cancel(self) -> None:
        """Drop the evaluations that are waiting, and stop the one in progress after its current batch.

        Returns after at most `PATIENCE` seconds. Does nothing if all evaluations are done.
        """
        self._cancelled.set()
        self._worker.close(PATIENCE)
        unscored = sorted(step for future, (step, _) in self._pending.items() if not _succeeded(future))
        if unscored:
            log.warning(f"not scored, because training ends: step {', '.join(map(str, unscored))}")
        if self._skipped:
            log.warning(f"{self._skipped} evaluations were skipped, because scoring was slower than training")

    def _raise_failure(self) -> None:
        for done in [future for future in self._pending if future.done()]:
            del self._pending[done]
            done.result()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError

    def _score(self, step: int, images: torch.Tensor, evaluations: int) -> None:
        for network in self._networks[len(self._references) :]:
            self._references.append(self._reference(network))
        rows = extract_each(self._networks, self._batches(images))
        scores = [
            evaluate.score(*each, real, network.name, self._metrics)
            for each, real, network in zip(rows, self._references, self._networks, strict=True)
        ]
        found: dict[str, Any] = {"step": step, "evaluations": evaluations}
        found |= evaluate.combined([network.name for network in self._networks], scores)
        self._write(found)
        self._found.append(found)
        shown = (f"{name} {found[name]:.4g}" for name in ("fid", "fd", "kid", "recall", "spread") if name in found)
        log.info(f"step {step}: {found['n']} images scored: {', '.join(shown) or 'see evaluation.jsonl'}")
        for note in evaluate.notes(found):
            log.info(note)

    def _reference(self, network: FeatureNetwork) -> Reference:
        if self._file is not None:
            return evaluate.reference_of(self._file, network, self._dataset.shape, check=self._check)
        return evaluate.reference(self._dataset, network, check=self._check)

    def _batches(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        for batch in torch.split(images, evaluate.BATCH):
            self._check()
            yield batch

    def _write(self, found: dict[str, Any]) -> None:
        """Add a line, and those that could not be written before."""
        self._unwritten.append(found)
        with self._output.attempt():
            lines = [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
            new = {(line["step"], line["evaluations"]) for line in self._unwritten}
            # A line of the same step was written before the run was resumed from an earlier step.
            kept = [line for line in lines if (line["step"], line["evaluations"]) not in new]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in [*kept, *self._unwritten]))
            self._unwritten.clear()


class RunEvaluation:
    """The evaluation of a run on all its ranks, which draw the samples together. Rank zero scores them.

    Every rank must call every method. Raises the errors of `BackgroundEvaluation` on rank zero, RankError on the
    others.
    """

    def __init__(self, config: RunConfig, dataset: ImageDataset, ranks: Ranks, run_dir: Path):
        self._every, self._count = config.evaluate.every_steps, config.evaluate.count
        self._evaluations, self._ranks = config.sample.steps, ranks
        self._scores: BackgroundEvaluation | None = ranks.run_on_all(
            lambda: (
                BackgroundEvaluation(config.evaluate, dataset, ranks.device, run_dir) if ranks.is_rank_zero else None
            ),
            (ConfigError, DataError),
        )

    def after_step(self, step: int, draw: Callable[[int], torch.Tensor], *, last: bool) -> None:
        """Queue an evaluation of `draw(count)` if it is due. The last step is scored even if too many are waiting.

        If `draw` returns fewer images, because training is about to stop, they are dropped.
        """
        if step % self._every:
            return
        if self._ranks.run_on_rank_zero(lambda: self._accepts(step, last), (Exception,)):
            images = draw(self._count)
            if self._scores is not None and len(images) == self._count:
                self._scores.submit(step, images, self._evaluations)
            elif self._scores is not None:
                log.warning(f"step {step} is not scored, because training ends")

    def _accepts(self, step: int, last: bool) -> bool:
        return last or (self._scores is not None and self._scores.accepts(step))

    def finish(self, stop_signal: Callable[[], int]) -> int:
        """Wait for the queued evaluations. Returns a signal that ended the wait, or 0.

        No collective takes long, whatever the evaluations take.
        """
        scores = self._scores
        while not self._ranks.run_on_rank_zero(lambda: scores is None or scores.wait(1.0), (Exception,)):
            if stop := max(self._ranks.gather(stop_signal())):
                return stop
        return 0

    def take(self) -> list[dict[str, Any]]:
        """The scores found since the last call, on rank zero; [] on the others."""
        return self._scores.take() if self._scores is not None else []

    def cancel(self) -> None:
        if self._scores is not None:
            self._scores.cancel()


def _use_own_stream(device: torch.device) -> None:
    """Give this thread's kernels on a GPU a stream of the lowest priority: those of training do not queue behind them.

    CUDA's lowest priority, 0, is also that of the stream of training. A new thread's current device is the first GPU
    unless it is set.
    """
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))  # on which the feature networks were loaded
    torch.cuda.set_stream(stream)


def _succeeded(future: Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
