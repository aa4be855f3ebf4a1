"""TensorBoard event files, written by the calling thread so that it sees the errors of the disk."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from udddm import image_grid
from udddm.errors import ConfigError
from udddm.log import Dispensable
from udddm.training import loggers
from udddm.training.callbacks import Callback, RunInfo


class Events:
    """Writes TensorBoard's event files. Does nothing after an error, which is reported once."""

    def __init__(self, directory: Path, purge_step: int):
        """TensorBoard hides values of the step `purge_step` and later that an earlier process wrote."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the imports of tensorboard
            logging.getLogger("tensorboard").setLevel(logging.ERROR)
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._output = Dispensable("TensorBoard's files")
        with self._output.attempt():
            directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
            self._file = (directory / name).open("wb")
            self._records = RecordWriter(self._file)
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._append(self._event(wall_time=time.time(), file_version="brain.Event:2"))
            self._append(self._event(wall_time=time.time(), step=purge_step, session_log=started))
            self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by tag."""
        self._write(step, [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def image(self, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """Write a picture of `size` (height, width) in pixels, encoded as PNG."""
        height, width = size
        encoded = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, [self._summary.Value(tag=tag, image=encoded)])

    def _write(self, step: int, values: list[Any]) -> None:
        if self._output.failed:  # the last record may be incomplete, and a reader stops there
            return
        with self._output.attempt():
            self._append(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
            self._file.flush()

    def _append(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]

    def close(self) -> None:
        with suppress(OSError, AttributeError):  # AttributeError: it could not be created
            self._file.close()


class TensorBoard(Callback):
    """Writes `<run>/tensorboard`: scalars in groups, grids of samples, and scores."""

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("loggers: tensorboard is not installed: pip install 'udddm[tensorboard]'")

    def on_start(self, run: RunInfo) -> None:
        self._events = Events(run.path / "tensorboard", run.step + 1)

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._events.scalars(step, loggers.grouped(metrics))

    def on_images(self, step: int, images: torch.Tensor) -> None:
        pixels = image_grid.pixels(images)
        self._events.image(step, "samples", image_grid.encode(pixels), pixels.shape[:2])

    def on_scores(self, step: int, scores: Mapping[str, Any]) -> None:
        self._events.scalars(step, loggers.scalars(scores))

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        self._events.close()
