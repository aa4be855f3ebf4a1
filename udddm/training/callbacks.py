"""The contract of callbacks, which receive the metrics, pictures, scores and result of a run.

The built-in loggers (udddm/training/loggers/) are callbacks, selected by name with the key `loggers`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig
from udddm.config.plugins import LOGGERS, load_plugin
from udddm.errors import ConfigError
from udddm.log import log


@dataclass(frozen=True)
class RunInfo:
    """The run that a callback belongs to."""

    id: str
    """Identifies the run. It stays the same when the run resumes."""
    where: str
    """Its directory or URL."""
    path: Path
    """A local directory, in which a callback may write files. Those of a run at a URL are uploaded."""
    config: RunConfig
    shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    step: int
    """The steps that are done: 0, or those of the checkpoint from which the run resumes. If the run was killed,
    later steps may have been reported before. They are repeated."""
    total_steps: int


class Callback:
    """Base class of callbacks. Override the methods of interest.

    A run calls them on its first rank, between two steps, so that they should return soon. An exception is logged with
    its traceback, and the callback is not called again; training continues, because it is worth more than its logs.
    """

    def on_start(self, run: RunInfo) -> None:
        """Called once, before the first step."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called every `log_every_steps` steps with what metrics.jsonl receives (docs/callbacks.md)."""

    def on_images(self, step: int, images: torch.Tensor) -> None:
        """Called every `sample.every_steps` steps with samples [N, C, H, W] in [-1, 1], on the host."""

    def on_scores(self, step: int, scores: Mapping[str, Any]) -> None:
        """Called after an evaluation (`evaluate.every_steps`), some steps after the `step` that it scores."""

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        """Called last: with the contents of result.json, or with None if the run stops before its end."""


Given = Callback | Callable[[], Callback] | str
"""A callback, a function without arguments that returns one, or its name as `package.module:function`."""


def check(given: object) -> None:
    """Raise ConfigError unless `given` is a sequence of callbacks as `udddm.train` takes them."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"callbacks={given!r}: give a list of callbacks")
    for each in given:
        if not (isinstance(each, (Callback, str)) or callable(each)):
            raise ConfigError(
                f"callbacks: {each!r} is a {type(each).__name__}; give an object of a subclass of udddm.Callback, or a "
                "function that returns one"
            )


def names(config: RunConfig) -> tuple[str, ...]:
    """The loggers of a run: those of `loggers`, or by default TensorBoard's, if it is installed."""
    if config.loggers is not None:
        return config.loggers
    if importlib.util.find_spec("tensorboard") is None:
        log.info("metrics are written to metrics.jsonl only; for TensorBoard, pip install 'udddm[tensorboard]'")
        return ()
    return ("tensorboard",)


def build(config: RunConfig, given: Sequence[Given] = ()) -> list[Callback]:
    """Create the loggers that a configuration names, and the callbacks of the caller.

    Raises ConfigError if a package is missing or something else than a callback is returned.
    """
    factories: list[Given] = [LOGGERS.load(name) for name in names(config)]
    found = []
    for each in [*factories, *given]:
        made = load_plugin(each, "callback") if isinstance(each, str) else each
        callback = made if isinstance(made, Callback) else made()
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks: {made!r} returned a {type(callback).__name__}, not a udddm.Callback")
        found.append(callback)
    return found


def check_loggers(config: RunConfig) -> None:
    """Raise ConfigError if a logger that a configuration names cannot be imported, or its package is missing."""
    for name in config.loggers or ():
        LOGGERS.load(name)()


class Callbacks:
    """The callbacks of a run. None of their exceptions ends the run."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._active, self._ended = list(callbacks), False

    @classmethod
    def start(cls, run: RunInfo, given: Sequence[Given], ranks: Ranks) -> Callbacks:
        """The callbacks of a run, which has loggers too, on its first rank; none on the others.

        Every rank must call this. Raises the errors of `build`.
        """
        made = ranks.run_on_all(lambda: build(run.config, given) if ranks.is_rank_zero else [], (ConfigError,))
        started = cls(made)
        started._call("on_start", run)
        return started

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._call("on_metrics", step, values)

    def images(self, step: int, images: torch.Tensor) -> None:
        self._call("on_images", step, images)

    def scores(self, step: int, scores: Mapping[str, Any]) -> None:
        self._call("on_scores", step, scores)

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Call `on_end`. Only the first call has an effect."""
        if not self._ended:
            self._ended = True
            self._call("on_end", result)

    def _call(self, method: str, *arguments: Any) -> None:
        for callback in list(self._active):
            name = type(callback).__name__
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:
                self._active.remove(callback)
                log.warning(
                    f"{name}.{method} failed: {type(error).__name__}: {error}. Training continues without {name}",
                    exc_info=not isinstance(error, OSError),
                )
