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

from udddm.log import Dispensable, log


class Events:
    """Writes scalars for TensorBoard. Does nothing after an error, which is reported once."""

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
            self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
            self._write(self._event(wall_time=time.time(), step=purge_step, session_log=started))
            self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._output.failed:  # the last record may be incomplete, and a reader stops there
            return
        with self._output.attempt():
            scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))
            self._file.flush()

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]

    def close(self) -> None:
        with suppress(OSError, AttributeError):  # AttributeError: it could not be created
            self._file.close()


def open_events(directory: Path, purge_step: int) -> Events | None:
    """A writer of event files, or None, with a log message, if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        log.info("metrics are written to metrics.jsonl only; for TensorBoard, pip install 'udddm[tensorboard]'")
        return None
    return Events(directory, purge_step)
