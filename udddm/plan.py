"""`udddm-train --dry-run`: what a run would do and need, from one measured step, with nothing written."""

from __future__ import annotations

import time

import torch

from udddm import objective, process
from udddm.backends.engine import build as build_engine
from udddm.backends.ranks import join
from udddm.config import RunConfig
from udddm.data import ImageDataset, MapDataset, load_dataset
from udddm.ema import EMA
from udddm.order import Order
from udddm.store import Encoding
from udddm.trainer import network_for

_MEASURED = 3


def plan(config: RunConfig, device: str = "auto", dataset: MapDataset | None = None) -> list[str]:
    """Lines that say what a run of `config` is: parameters, state, memory, bandwidth, steps and time."""
    ranks = join(device, config.order.lanes, group=config.engine.name == "deepspeed")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    images = ImageDataset(dataset if dataset is not None else _dataset(config))
    order = Order.build(config.order, config.seed, len(images), config.train.batch_size, images.shape)
    lanes = order.lanes_of(ranks.rank, ranks.world)
    steps = config.train.steps or max(1, round((config.train.epochs or 0) * order.steps))
    sample_bytes = int(torch.tensor(images.shape).prod()) * Encoding(config.store.dtype).array.itemsize
    network = network_for(config, images.shape)
    parameters = sum(p.numel() for p in network.parameters())

    engine = build_engine(network, config, ranks, steps)
    emas = [EMA(engine.weights(), decay) for decay in config.train.ema]
    visit = objective.build(config, process.build(config.process), steps / order.steps, images.shape)
    batch = order.batch_of(lanes, 0, 0)
    x0, labels = images.batch(batch.ids)
    x0 = x0.to(ranks.device)
    chosen = torch.from_numpy(labels).to(ranks.device) if config.network.classes and labels is not None else None
    state = torch.zeros_like(x0)
    seconds = []
    for i in range(_MEASURED):
        began = time.perf_counter()
        visits = visit.plan(batch.ids, 0).to(ranks.device)
        with engine.autocast():
            losses, _ = visit(engine.module, x0, state, visits, chosen)
        engine.backward_and_step(losses.mean(), i)
        for ema in emas:
            ema.update(1)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds.append(time.perf_counter() - began)
    step = min(seconds)
    rate = config.train.batch_size / step
    window = order.window_chunks * order.chunk * sample_bytes
    resident = {
        "gpu": f"{_size(len(images) * sample_bytes / ranks.world)} on {ranks.device.type}",
        "pinned": f"{_size(len(images) * sample_bytes / ranks.world)} of host memory",
        "zarr": f"at most {_size(3 * len(lanes) * min(window, order.longest_lane * sample_bytes))} of host memory",
    }
    hours = steps * step / 3600
    return [
        f"data: {len(images)} images {'x'.join(map(str, images.shape))}, batches of {config.train.batch_size}",
        f"network: {parameters:,} parameters; objective: {config.objective.name}; "
        f"process: {config.process.kind} ({config.process.preconditioning})",
        f"memory: {_size(parameters * 4 * (4 + len(emas)))} for weights, gradients, Adam's moments and "
        f"{len(emas)} EMA, and activations",
        f"x0-state: {_size(len(images) * sample_bytes)} a generation in {config.store.dtype}; "
        f"{order.lanes} lanes of {order.chunks(0)} chunks of {order.chunk} samples "
        f"({_size(order.chunk * sample_bytes)})",
        f"store {config.store.kind}: a rank holds {resident[config.store.kind]}",
        f"bandwidth: {_size(rate * sample_bytes)}/s read and as much written, at the measured speed",
        f"length: {steps:,} steps, {steps / order.steps:.1f} epochs of {order.steps} steps",
        f"time: {hours:.2f} h at {step * 1000:.0f} ms a step, {rate:.0f} images/s (measured here, {ranks.world} rank"
        f"{'s' if ranks.world > 1 else ''}, {ranks.device.type}, best of {_MEASURED} steps)",
    ]


class _Blank:
    """Black images of a data set's number and shape: a plan downloads nothing."""

    def __init__(self, length: int, shape: tuple[int, int, int]):
        self._length, self._shape = length, shape

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> tuple[torch.Tensor, int]:
        return torch.zeros(self._shape), 0


def _dataset(config: RunConfig) -> MapDataset:
    if config.data.name == "cifar10" and config.data.path is None:
        return _Blank(50_000, (3, 32, 32))
    return load_dataset(config.data)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
