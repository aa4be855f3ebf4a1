"""P8: the trainer, by store, against a bare loop of the same network and loss on the same device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import TINY_SHAPE, Shape, alone, pixels, preset, running, synchronize, tiny
from udddm import networks
from udddm.backends.engines.ddp import channels_last
from udddm.backends.engines.graphs import GraphedNetwork
from udddm.config import RunConfig
from udddm.diffusion import schedule
from udddm.diffusion.denoise import denoise
from udddm.diffusion.schedule import Coefficients
from udddm.objectives import pseudo_huber

STORES = ("gpu", "pinned", "zarr")


def config(bench: Bench, graphs: bool) -> tuple[RunConfig, Shape]:
    """A chain objective: half of the visits have a teacher's pass."""
    objective = "objective={name: chain, huber_c: 0.3, chain: {length: 2, stages: [{start: 0, levels: 16}]}}"
    if bench.small:
        return tiny(objective, "train.batch_size=32"), TINY_SHAPE
    settings = (objective, "train.batch_size=128", "train.precision=bf16", "network.dropout=0")
    return preset("cifar10", *settings, f"train.cuda_graphs={graphs}", "network.base_channels=64"), (3, 32, 32)


def bare_loop(config: RunConfig, images: torch.Tensor) -> Callable[[], None]:
    """A function that takes one step: images and states in two tensors, torch's generator, no averages."""
    device, shape = images.device, tuple(images.shape[1:])
    steps = schedule.build(config.schedule)
    network = networks.for_run(config, (shape[0], shape[1], shape[2])).to(device)
    if channels_last(config.train, device):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    called: torch.nn.Module = network
    if config.train.cuda_graphs:
        called = GraphedNetwork(network, copy_gradients=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.train.learning_rate, fused=True)
    state = torch.randn_like(images)
    found = steps.coefficients(steps.levels(config.objective.chain.stages[0].levels))
    levels = torch.from_numpy(found).to(device)
    batch, c = config.train.batch_size, 0.3

    def noised(x0: torch.Tensor, eps: torch.Tensor, at: Coefficients) -> torch.Tensor:
        return at.alpha[:, None, None, None] * x0 + at.sigma[:, None, None, None] * eps

    def step() -> None:
        rows = torch.randint(len(images), (batch,), device=device)
        x0, target, eps = images[rows], state[rows], torch.randn(batch, *shape, device=device)
        level = torch.randint(1, levels.shape[1], (batch,), device=device)
        taught = batch // 2
        evaluated = slice(batch if config.train.cuda_graphs else taught)  # as the trainer: a graph has one size
        enabled = config.train.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                below = Coefficients(*levels[:, level[evaluated] - 1])
                estimate = denoise(called, noised(x0[evaluated], eps[evaluated], below), below, None, None)
                target[:taught] = estimate[:taught]
            at = Coefficients(*levels[:, level])
            output = denoise(called, noised(x0, eps, at), at, None, None)
        loss = pseudo_huber(output, target, c).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        state[rows] = output.detach()

    return step


def against_bare(bench: Bench, graphs: bool = False) -> None:
    """Rounds of the bare loop and of the trainer take turns; ratios are of a round's neighbors."""
    chosen, shape = config(bench, graphs)
    ranks, dataset = alone(bench), pixels(bench.pick(8192, 256), shape)
    images = dataset.batch(torch.arange(len(dataset)).numpy())[0].to(ranks.device)
    steps: dict[str, Callable[[], Any]] = {"bare": bare_loop(chosen, images)}
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *STORES)}
    count = bench.pick(20, 4)
    with ExitStack() as stack:
        trainers = {}
        for kind in STORES:
            one = chosen.model_copy(update={"store": chosen.store.model_copy(update={"kind": kind})})
            trainer, inputs = stack.enter_context(running(one, dataset, bench.scratch / kind, ranks))
            trainers[kind] = trainer
            steps[kind] = partial(trainer.train_step, inputs)
        for number in range(bench.pick(5, 2)):
            for name, step in steps.items():
                synchronize(ranks.device)
                began = time.perf_counter()
                for _ in range(count):
                    step()
                synchronize(ranks.device)
                if number:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
        counted = {kind: t.store.counters for kind, t in trainers.items()}
        waits = {kind: (c.waited, c.read_wait + c.write_wait) for kind, c in counted.items()}
        idle = {name: idle_share(step, ranks.device, bench.pick(8, 1)) for name, step in steps.items()}
    size = count * chosen.train.batch_size
    for name, spent in seconds.items():
        figures: dict[str, Any] = {"images_per_s": round(size / statistics.median(spent), 1), "gpu_idle": idle[name]}
        if name != "bare":
            ratios = [b / s for b, s in zip(seconds["bare"], spent, strict=True)]
            figures["of_bare"] = round(statistics.median(ratios), 3)
            device, host = (round(wait / sum(spent), 4) for wait in waits[name])
            figures |= {"store_wait": device, "store_wait_of_host": host}
        bench.report(**{name: figures})


SHORT = 20.0
"""Microseconds. Between the kernels of a CUDA graph the device pauses for one or two; a longer pause waits for work."""


def idle_share(step: Callable[[], Any], device: torch.device, count: int) -> dict[str, float] | None:
    """The share of time in which no kernel or copy runs, and the part of it in pauses that are not short, so that the
    device had nothing to do. None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(count):
            step()
        synchronize(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if str(event.device_type).endswith("CUDA")
    )
    if not spans:
        return None
    first: float = spans[0][0]
    idle, waiting, end = 0.0, 0.0, first
    for start, stop in spans:
        pause = max(0.0, start - end)
        idle += pause
        waiting += pause if pause > SHORT else 0.0
        end = max(end, stop)
    whole = max(end - first, 1e-9)
    return {"share": round(idle / whole, 4), "without_work": round(waiting / whole, 4)}


def with_graphs(bench: Bench) -> None:
    """Both through CUDA graphs, so that the device is busy; both evaluate all rows for targets."""
    against_bare(bench, True)


CHECKS = (
    Check("P8", "against_bare", 70, against_bare),
    Check("P8", "graphs", 70, with_graphs, "CUDA graphs"),
)
