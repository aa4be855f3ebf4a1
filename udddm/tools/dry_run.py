"""`udddm train --dry-run`: the cost of a run, counted and measured, without writing or downloading anything."""

from __future__ import annotations

from dataclasses import replace

import torch

from udddm import objectives
from udddm import store as stores
from udddm.backends import engines
from udddm.backends.distributed.ranks import Ranks, join
from udddm.backends.engines import memory
from udddm.config import ExpectConfig, RunConfig
from udddm.data import ImageDataset, MapDataset, expected, load_dataset
from udddm.diffusion import schedule
from udddm.errors import ConfigError
from udddm.networks.cost import cost as network_cost
from udddm.objectives import Objective
from udddm.order import Order, most_lanes
from udddm.store import Encoding, StateLayout
from udddm.tools import gpus
from udddm.tools.gpus import GPUs
from udddm.tools.throughput import UTILISATION, Speed, an_image, emulated, measure, teacher_share

REFERENCE = gpus.parse("8xH100")
"""The GPUs of the estimate, if none are named and none are here; fewer if the order has fewer lanes."""
LONGEST = 1000 * 86400.0
"""Seconds. How much longer a run would take does not matter."""


def plan(
    config: RunConfig, device: str = "auto", dataset: MapDataset | None = None, on: GPUs | None = None
) -> list[str]:
    """Lines that describe a run of `config`: data, network, memory, state and time. Memory and time are for the GPUs
    `on`, or those here, or 8 H100.

    Without `dataset`, the data are loaded only if `data.path` is set or their size is not known otherwise. Raises
    ConfigError and DataError as a run would.
    """
    lanes_here = most_lanes(config.order, config.train.batch_size)
    ranks = join(device, lanes_here, group=engines.find(config).needs_process_group)
    if config.train.torch_threads is not None:
        torch.set_num_threads(config.train.torch_threads)
    train = config.train
    data, origin = _data(config, dataset)
    order = Order.build(config.order, config.seed, data.samples, train.batch_size, data.shape)
    steps = train.steps or max(1, round((train.epochs or 0) * order.steps_per_epoch))
    visit = objectives.build(config, schedule.build(config.schedule), steps / order.steps_per_epoch, data.shape)
    cost = network_cost(config.network, data.shape)
    calls = objectives.teacher_of(config)
    teacher = teacher_share(visit, calls, data.samples, steps / order.steps_per_epoch)
    flops = an_image(cost, teacher)

    here = _gpu_here(ranks)
    if on is None:
        most = max(count for count in range(1, REFERENCE.count + 1) if order.num_lanes % count == 0)
        on = here or replace(REFERENCE, count=most)
    lanes = order.lanes_of(0, on.count)
    target = StateLayout(order, lanes, data.shape, Encoding(config.store.dtype), torch.device("cuda"))
    speed = measure(config, data, order, ranks, steps, visit, cost)
    step = speed.step(train.batch_size * flops / ranks.world_size)
    calls_for = f", with {teacher:.2g} passes for the target of a visit" if teacher else ""
    return [
        f"data: {data.samples} images {'x'.join(map(str, data.shape))} ({origin}); {steps:,} steps of "
        f"{train.batch_size}, {steps / order.steps_per_epoch:,.1f} epochs",
        f"network: {cost.parameters:,} parameters, {flops / 1e9:.3g} GFLOP per image{calls_for}; "
        f"objective: {objectives.describe(config, visit)}; schedule: {config.schedule.kind} "
        f"({config.schedule.preconditioning})",
        _memory(config, data, visit, target, on),
        _state(config, visit, target, train.batch_size / step),
        f"time: {_on(on, here, config, flops, steps, step)}{_here(ranks, config, speed, steps, step)}",
    ]


def _gpu_here(ranks: Ranks) -> GPUs | None:
    """The GPUs that the run would use here, if their kind is known."""
    if ranks.device.type != "cuda":
        return None
    kind = gpus.named(torch.cuda.get_device_name(ranks.device))
    return GPUs(ranks.world_size, kind) if kind else None


def _memory(config: RunConfig, data: ExpectConfig, objective: Objective, layout: StateLayout, on: GPUs) -> str:
    """The memory of one of the GPUs `on`, and the accumulation with which it suffices."""
    train, limit = config.train, on.kind.memory
    chosen = stores.find(stores.for_objective(config.store, objective.reads_state))
    on_gpu = chosen.keeps_state and "GPU" in chosen.memory_kind(layout.device)
    state = chosen.resident_bytes(layout) if on_gpu else 0
    try:
        found = memory.needed(config, data.shape)
    except Exception as error:  # a network of someone else that cannot run without data
        return f"memory: not counted, because the network cannot run without data ({type(error).__name__}: {error})"
    total = replace(found, fixed=found.fixed + state)
    rows, parts = train.batch_size // on.count, train.grad_accumulation
    images = -(-rows // parts)
    kept = ", the x0-state" if on_gpu else ""
    text = (
        f"memory: {_size(total.of(images))} per GPU: {_size(total.fixed)} for weights, gradients, moments, "
        f"{len(train.averages)} EMA{kept} and CUDA, {_size(images * total.per_image)} for the activations of "
        f"{_count(images, 'image')}"
    )
    whose = f"the {_size(limit)} of {'an' if on.kind.name[0] in 'AHLR' else 'a'} {on.kind.name}"
    if total.of(images) <= limit:
        return f"{text}; fits {whose}"
    more = total.accumulation(rows, limit, parts)
    if more is None:
        return f"{text}; does not fit {whose}, not even one image at a time: use a smaller network, or larger GPUs"
    other = memory.recompute_suffices(config, data.shape, images, limit - state)
    return f"{text}; does not fit {whose}: set train.grad_accumulation={more}{' or train.recompute=true' * other}"


def _state(config: RunConfig, objective: Objective, layout: StateLayout, rate: float) -> str:
    """The size of the x0-state, its memory and its bandwidth at `rate` images/s, or why there is none."""
    order, row = layout.order, layout.row_bytes
    chosen = stores.find(stores.for_objective(config.store, objective.reads_state))
    if not chosen.keeps_state:
        return f"x0-state: none, because {config.objective.name} does not read it"
    return (
        f"x0-state: {_size(order.samples * row)} per generation in {config.store.dtype}; "
        f"{order.num_lanes} lanes of {order.num_chunks(0)} chunks of {order.chunk_size} samples "
        f"({_size(order.chunk_size * row)}); store {config.store.kind}: each rank holds at most "
        f"{_size(chosen.resident_bytes(layout))} in {chosen.memory_kind(layout.device)}; bandwidth: "
        f"{_size(rate * row)}/s read and as much written, at the speed measured here"
    )


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


def _on(on: GPUs, here: GPUs | None, config: RunConfig, flops: float, steps: int, measured: float) -> str:
    """The time on the GPUs `on`: from the step measured on one of them here, or from their peak."""
    train = config.train
    if here is not None and on.kind == here.kind:
        if on == here:
            return ""
        step: float | None = measured * here.count / on.count
        how = f"the step measured here, divided by {on.count / here.count:g}; without communication"
    else:
        step = on.step(train.batch_size * flops, train.precision)
        peak = on.kind.peak(train.precision) / 1e12
        how = f"assumed: {UTILISATION:.0%} of {peak:.0f} TFLOP/s in {train.precision}; without communication"
    if step is None:
        return f"no estimate for {on}: launching the kernels of so small a step takes longer than its operations; "
    return (
        f"{_duration(steps * step)} on {on} at {_duration(step)} per step, {train.batch_size / step:,.0f} images/s "
        f"({how}); "
    )


def _here(ranks: Ranks, config: RunConfig, speed: Speed, steps: int, step: float) -> str:
    """The time on this machine."""
    device = f"{ranks.device.type} in fp32" if emulated(config, ranks) else ranks.device.type
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    return (
        f"{_duration(steps * step)} here at {_duration(step)} per step, {config.train.batch_size / step:.4g} images/s "
        f"(measured here: {_count(ranks.world_size, 'rank')}, {device}, "
        f"{_count(torch.get_num_threads(), 'thread')}, "
        f"{_count(speed.images, 'image')} at a time)"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _duration(seconds: float) -> str:
    if seconds > LONGEST:
        return f"more than {LONGEST / 86400:,.0f} days"
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
