"""Reads the batches of the coming steps in several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from udddm.data.dataset import ImageDataset
from udddm.data.images import Ids, Labels
from udddm.errors import ConfigError, DataError, picklable

log = logging.getLogger(__name__)

LabeledImages = tuple[torch.Tensor, Labels | None]
"""Images, float32 [n, C, H, W] in [-1, 1] (2 C channels if paired), and labels, int64 [n] or None: the result of
`ImageDataset.read`."""


class ProcessReader:
    """Reads the parts of each batch in several processes, so that images are decoded in parallel.

    The batches are the same for any number of processes. Every process has its own copy of the data set, which must be
    picklable. Raises ConfigError if it is not.
    """

    def __init__(self, dataset: ImageDataset, processes: int):
        try:
            pickled = pickle.dumps(dataset)
        except Exception as error:  # pickling fails with PicklingError, TypeError, AttributeError and others
            raise ConfigError(
                f"data.workers={processes}: the data set cannot be sent to other processes ({error}). Define its class "
                "at the top level of a module and open files in __getitem__, or set data.workers=0"
            ) from None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._processes = processes
        # A pipe, because an event waits for processes that were killed.
        self._ending, self._end = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(processes, context, _begin, (pickled, self._ending))

    def request(self, ids: Ids) -> Callable[[Ids], LabeledImages]:
        """Announce a batch that will be needed soon. The function that is returned takes the same ids, waits for the
        batch, and raises the errors of `ImageDataset.batch`."""
        try:
            parts = [self._pool.submit(_read, part) for part in np.array_split(ids, self._processes) if len(part)]
        except BrokenProcessPool as error:
            return partial(_lost, error)
        return partial(self._joined, parts)

    def _joined(self, parts: list[Future[tuple[np.ndarray[Any, Any], Labels | None]]], ids: Ids) -> LabeledImages:
        try:
            read = [part.result() for part in parts]
        except BrokenProcessPool as error:
            return _lost(error, ids)
        images = torch.from_numpy(np.concatenate([images for images, _ in read]))
        labels = [found for _, found in read if found is not None]
        return images, np.concatenate(labels) if labels else None

    def close(self) -> None:
        """End the processes, also those whose data set does not answer."""
        if not self._end.closed:
            self._end.send_bytes(b"end")  # nobody reads it, so that every process sees it
            self._end.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def open_reader(dataset: ImageDataset, processes: int) -> ProcessReader | None:
    """None without processes, or if the images are in memory."""
    if processes and dataset.in_memory:
        log.info("data.workers has no effect: the images are in memory, or in a memory-mapped file")
    return ProcessReader(dataset, processes) if processes and not dataset.in_memory else None


def _lost(error: BrokenProcessPool, ids: Ids) -> LabeledImages:
    raise DataError(
        "a process that reads the data set ended unexpectedly: it ran out of memory, was killed, or could not import "
        'the program that started it (a script needs `if __name__ == "__main__":`). Lower data.workers, or set it to 0'
    ) from error


# In the other processes.

_opened: ImageDataset | BaseException = DataError("the data set is not open")


def _begin(pickled: bytes, ending: Connection) -> None:
    """Open the data set in a new process. An error is raised when the first batch is read."""
    global _opened
    os.setpgid(0, 0)  # Ctrl-C and a job's signals concern only the process that trains, which ends this one
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(ending,), daemon=True).start()
    torch.set_num_threads(1)
    try:
        _opened = pickle.loads(pickled)
    except Exception as error:
        _opened = picklable(error, DataError)


def _end_with_parent(ending: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([ending, parent.sentinel])
    os._exit(0)


def _read(ids: Ids) -> tuple[np.ndarray[Any, Any], Labels | None]:
    if isinstance(_opened, BaseException):
        raise _opened
    try:
        images, labels = _opened.read(ids)
    except Exception as error:
        raise picklable(error, DataError) from error
    return images.numpy(), labels
