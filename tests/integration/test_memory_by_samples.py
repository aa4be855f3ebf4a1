"""The memory of a rank does not grow with the number of samples, once these fill its windows."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from udddm import objectives
from udddm.config import RunConfig, resolve
from udddm.data import ArrayImages, ImageDataset
from udddm.diffusion import schedule
from udddm.order import Order
from udddm.store import Encoding, StateLayout
from udddm.store.autotune import Limits
from udddm.store.zarr import ZarrStore
from udddm.training.inputs import InputBuilder, Prefetch

SHAPE = (1, 4, 4)
SAMPLES, TIMES = 4096, 16
ROWS = 64
"""Samples per chunk: few, so that what is kept for each chunk shows."""
MOST = 8.0
"""Bytes per sample. With chunks of hundreds of samples, as usual, it is less than one."""
ATTEMPTS = 3
"""A peak depends on how the threads happen to run; what grows with the samples is in every one."""


def settings() -> RunConfig:
    return resolve(
        {
            "objective": {"name": "ict", "pretrain": 0, "refined": {"share": 0.5}},
            "train": {"steps": 100, "batch_size": 512},
            "order": {"lanes": 8, "chunk": ROWS, "window": 2},
        }
    )


def peak_of_an_epoch(samples: int, directory: Path) -> int:
    """The largest number of bytes that Python and NumPy have allocated at once while a rank of half of the lanes reads
    the images of an epoch, plans its visits, and reads and writes its states."""
    config, device = settings(), torch.device("cpu")
    pixels = np.broadcast_to(np.uint8(7), (samples, *SHAPE))  # takes no memory
    images = ImageDataset(ArrayImages(pixels))
    objective = objectives.build(config, schedule.build(config.schedule), 2.0, SHAPE)
    gc.collect()
    tracemalloc.start()
    try:
        order = Order.build(config.order, 0, samples, config.train.batch_size, SHAPE)
        lanes = order.lanes_of(0, 2)
        layout = StateLayout(order, lanes, SHAPE, Encoding("fp16"), device)
        store = ZarrStore(layout, directory, default=True, limits=Limits(threads=2, prefetch=2, memory=100_000))
        inputs = Prefetch(InputBuilder(order, lanes, images, objective, device, None), step=0, depth=2)
        store.start(0, 0, None)
        for _ in range(order.steps_per_epoch + 2):  # and the beginning of the next one, which reads what was written
            inputs.next()
            store.write(store.read())
        store.settle()
        store.close()
        inputs.close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_epoch_takes_the_same_memory_for_sixteen_times_the_samples(tmp_path: Path) -> None:
    peak_of_an_epoch(SAMPLES, tmp_path / "first")  # imports and caches
    few, many = (
        min(peak_of_an_epoch(samples, tmp_path / f"{samples}-{attempt}") for attempt in range(ATTEMPTS))
        for samples in (SAMPLES, TIMES * SAMPLES)
    )
    assert many - few < MOST * (TIMES - 1) * SAMPLES
