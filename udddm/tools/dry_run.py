"""`udddm-train --dry-run`: the cost of a run, counted and measured, without writing or downloading anything."""

from __future__ import annotations

import torch

from udddm import objectives
from udddm import store as stores
from udddm.backends import engines
from udddm.backends.distributed.ranks import join
from udddm.config import ExpectConfig, RunConfig
from udddm.data import ImageDataset, MapDataset, expected, load_dataset
from udddm.diffusion import schedule
from udddm.errors import ConfigError
from udddm.networks.cost import cost as network_cost
from udddm.objectives.base import Objective
from udddm.order import Order
from udddm.store import Encoding, StateLayout
from udddm.tools.throughput import GPUS, an_image, emulated, measure, on_h100s, teacher_share


def plan(config: RunConfig, device: str = "auto", dataset: MapDataset | None = None) -> list[str]:
    """Lines that describe a run of `config`: parameters, operations, state, memory, bandwidth, steps and time.

    Without `dataset`, the data are loaded only if `data.path` is set or their size is not known otherwise. Raises
    ConfigError and DataError as a run would.
    """
    ranks = join(device, config.order.lanes, group=engines.find(config).needs_process_group)
    if config.train.torch_threads is not None:
        torch.set_num_threads(config.train.torch_threads)
    train = config.train
    data, origin = _data(config, dataset)
    order = Order.build(config.order, config.seed, data.samples, train.batch_size, data.shape)
    lanes = order.lanes_of(ranks.rank, ranks.world_size)
    steps = train.steps or max(1, round((train.epochs or 0) * order.steps_per_epoch))
    visit = objectives.build(config, schedule.build(config.schedule), steps / order.steps_per_epoch, data.shape)
    cost = network_cost(config.network, data.shape)
    calls = objectives.teacher_of(config)
    teacher = teacher_share(visit, calls, data.samples, steps / order.steps_per_epoch)
    operations = train.batch_size * an_image(cost, teacher)

    speed = measure(config, data, order, ranks, steps, visit, cost)
    step = speed.step(operations / ranks.world_size)
    rate = train.batch_size / step
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None

    layout = StateLayout(order, lanes, data.shape, Encoding(config.store.dtype), ranks.device)
    averages = len(train.averages)
    device = f"{ranks.device.type} in fp32" if emulated(config, ranks) else ranks.device.type
    return [
        f"data: {data.samples} images {'x'.join(map(str, data.shape))} ({origin}), batches of {train.batch_size}",
        f"network: {cost.parameters:,} parameters; objective: {objectives.describe(config, visit)}; "
        f"schedule: {config.schedule.kind} ({config.schedule.preconditioning})",
        f"compute: {an_image(cost, teacher) / 1e9:.4g} GFLOP per image and step: {cost.training / 1e9:.4g} forward and "
        f"backward, and {cost.forward / 1e9:.4g} forward for targets that are not stored, at {teacher:.1%} of the "
        "visits",
        f"memory: {_size(cost.parameters * 4 * (4 + averages))} for weights, gradients, Adam's moments and "
        f"{averages} EMA, and activations",
        *_state(config, visit, layout, rate),
        f"length: {steps:,} steps, {steps / order.steps_per_epoch:.1f} epochs of {order.steps_per_epoch} steps",
        f"time: {_duration(steps * step)} at {_duration(step)} per step, {rate:.4g} images/s (measured here, "
        f"{_count(ranks.world_size, 'rank')}, {device}: {_count(speed.images, 'image')} forward and backward in "
        f"{_duration(speed.passes)}, scaled in proportion to a step's {train.batch_size}, and "
        f"{_duration(speed.update)} for the optimizer and EMA)",
        _h100s(
            *on_h100s(speed, operations, train.precision, gpu),
            steps,
            train.batch_size,
            layout.row_bytes if visit.reads_state else 0,
        ),
    ]


def _state(config: RunConfig, objective: Objective, layout: StateLayout, rate: float) -> list[str]:
    """The size of the x0-state, its memory and its bandwidth at `rate` images/s, or why there is none."""
    order, row = layout.order, layout.row_bytes
    chosen = stores.find(stores.for_objective(config.store, objective.reads_state))
    if not chosen.keeps_state:
        return [f"x0-state: none, because {config.objective.name} does not read it"]
    return [
        f"x0-state: {_size(order.samples * row)} per generation in {config.store.dtype}; "
        f"{order.num_lanes} lanes of {order.num_chunks(0)} chunks of {order.chunk_size} samples "
        f"({_size(order.chunk_size * row)})",
        f"store {config.store.kind}: each rank holds at most {_size(chosen.resident_bytes(layout))} in "
        f"{chosen.memory_kind(layout.device)}",
        f"bandwidth: {_size(rate * row)}/s read and as much written, at the measured speed",
    ]


def _data(config: RunConfig, dataset: MapDataset | None) -> tuple[ExpectConfig, str]:
    """The size of the data set, and whether it was loaded. Raises ConfigError, DataError."""
    known = expected(config.data)
    if dataset is None and config.data.path is None and known is not None:
        data, origin = known, "not loaded"
    else:
        images = ImageDataset(dataset if dataset is not None else load_dataset(config.data))
        classes = (images.classes or config.network.classes or None) if images.labelled else None
        data, origin = ExpectConfig(samples=len(images), shape=images.shape, classes=classes), "loaded"
    if config.network.classes and data.classes is None:
        raise ConfigError("network.classes is set, but the data set has no labels")
    return data, origin


def _h100s(step: float | None, how: str, steps: int, batch: int, sample_bytes: int) -> str:
    if step is None:
        return f"on {GPUS} H100: {how}"
    rate = batch / step
    state = f"; the node then reads {_size(rate * sample_bytes)}/s of state and writes as much" if sample_bytes else ""
    return (
        f"on {GPUS} H100: {steps * step / 86400:.2f} days at {_duration(step)} per step, {rate:.0f} images/s ({how}; "
        f"without communication){state}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365.25 * 86400), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
