"""Estimates the time of a step, here and on 8 H100, from a measured micro-batch.

A full step of a large network may take more memory or time than the planning machine has. So the forward and backward
pass of a micro-batch is measured, and scaled in proportion to the counted operations.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import numpy as np
import torch

from udddm import ema, networks
from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines import build as build_engine
from udddm.backends.engines import samples_a_part
from udddm.config import ExpectConfig, RunConfig
from udddm.networks.cost import Cost
from udddm.objectives import Objective, Teacher, teacher_of, visit_loss
from udddm.order import Order

GPUS = 8
PEAK = {"fp32": 494e12, "bf16": 989e12, "fp16": 989e12}
"""FLOP/s of an H100 SXM by `train.precision`, without sparsity; fp32 is TF32, which cuDNN's convolutions use. (NVIDIA
H100 Tensor Core GPU data sheet.)"""
UTILISATION = 0.15
"""The fraction of `PEAK` that training is assumed to reach if no GPU was measured. EDM's ImageNet-64 run reached it
(github.com/NVlabs/edm: 2,500 M images in 13 days on 32 A100, with a network of the same cost as that of
the preset imagenet-64)."""
PEAKS = {
    ("H100", "PCIe"): 756e12,
    ("H100",): 989e12,
    ("H200",): 989e12,
    ("A100",): 312e12,
    ("L4",): 121e12,
    ("V100",): 125e12,
    ("T4",): 65e12,
}
"""Dense bf16 (V100, T4: fp16) FLOP/s of GPUs by a part of their name; the first match counts (NVIDIA data sheets)."""
SHORTEST = 10e-3
"""Seconds. A step whose operations would take less is bound by launching a few thousand kernels."""

_OPERATIONS = {"cpu": 3e11, "cuda": 1e14}
"""Approximate operations of a micro-batch: seconds on a slow core, a fraction of a second on a GPU."""
_ENOUGH = 5.0  # seconds of measuring, after which no further pass is started
_PASSES = 3
_EPOCHS, _VISITS = 16, 1024  # the teacher's share is averaged over these


@dataclass(frozen=True)
class Speed:
    """Seconds of a measured forward and backward pass of a micro-batch, and of the optimizer step after it."""

    images: int
    operations: float
    """Operations counted for the micro-batch."""
    passes: float
    update: float

    def step(self, operations: float) -> float:
        """Seconds of a step whose passes take `operations` FLOP."""
        return self.passes * operations / self.operations + self.update


def an_image(cost: Cost, teacher: float) -> float:
    """Operations per image: the trained pass, and the teacher's forward pass for a fraction `teacher` of the visits."""
    return cost.training + teacher * cost.forward


def teacher_share(visit: Objective, teacher: Teacher, samples: int, epochs: float) -> float:
    """Fraction of the visits for which the network evaluates targets, averaged over a run of `epochs` epochs."""
    ids = np.unique(np.linspace(0, samples - 1, _VISITS).astype(np.int64))
    chosen = np.unique(np.linspace(0, max(0.0, np.ceil(epochs) - 1), _EPOCHS).astype(np.int64))
    return float(np.mean([teacher.evaluated(visit.plan(ids, int(epoch))) / len(ids) for epoch in chosen]))


def emulated(config: RunConfig, ranks: Ranks) -> bool:
    """Whether the run's precision is emulated on this device and too slow to measure."""
    return ranks.device.type == "cpu" and config.train.precision == "fp16"


def measure(
    config: RunConfig, data: ExpectConfig, order: Order, ranks: Ranks, steps: int, visit: Objective, cost: Cost
) -> Speed:
    """Time some steps of a micro-batch and return the fastest. The images are black; the speed does not depend on them.

    The micro-batch has the size of a rank's part of a step, or less to fit the device's memory and a few seconds. An
    fp16 run is measured in fp32 on a CPU, because most CPUs have no fp16 instructions.
    """
    if emulated(config, ranks):
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    engine = build_engine(networks.for_run(config, data.shape), config, ranks, steps)
    averages = ema.build(config.train, engine.weights())
    teacher = teacher_of(config, engine)
    every = order.batch_of(order.lanes_of(ranks.rank, ranks.world_size), 0, 0).ids
    most = int(_OPERATIONS[ranks.device.type] / an_image(cost, 1))
    images = max(1, min(most, samples_a_part(config, ranks.world_size)))
    passes: list[float] = []
    updates: list[float] = []
    warm = False  # the first pass compiles, selects kernels and allocates memory, and is not counted
    while len(passes) < _PASSES and sum(passes) + sum(updates) < _ENOUGH:
        visits = visit.plan(every[:images], 0)
        operations = images * cost.training + teacher.evaluated(visits) * cost.forward
        x0 = torch.zeros(images, *data.shape, device=ranks.device)
        labels = torch.zeros(images, dtype=torch.int64, device=ranks.device) if config.network.classes else None
        began = _now(ranks.device)
        try:
            with engine.micro_batch(last=True):
                with engine.autocast():
                    losses, _ = visit_loss(engine.module, x0, x0, visits.to(ranks.device), labels, teacher)
                engine.backward(losses.mean())
        except torch.OutOfMemoryError:
            if images == 1:
                raise
            images, passes, updates, warm = images // 2, [], [], False
            continue
        passed = _now(ranks.device)
        engine.step(len(passes))
        for average in averages:
            average.update(1)
        if warm:
            passes.append(passed - began)
            updates.append(_now(ranks.device) - passed)
        warm = True
    return Speed(images, operations, min(passes), min(updates))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(name: str) -> float | None:
    """The entry of `PEAKS` for the device that CUDA calls `name`; None if it is not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    return next((flops for parts, flops in PEAKS.items() if words.issuperset(parts)), None)


def on_h100s(speed: Speed, operations: float, precision: str, gpu: str | None) -> tuple[float | None, str]:
    """Estimated seconds of a step of `operations` FLOP on 8 H100, and the method; or None and the reason why there is
    no useful estimate. `gpu` is CUDA's name of the measured device, if any. Communication is not included."""
    known = peak(gpu) if gpu else None
    if known is None:
        seconds = operations / (GPUS * PEAK[precision] * UTILISATION)
        if seconds < SHORTEST:
            return None, "not measured, and no estimate: launching the kernels of so small a step takes longer"
        return seconds, (
            f"not measured: counted operations at an assumed {UTILISATION:.0%} of the {PEAK[precision] / 1e12:.0f} "
            f"TFLOP/s peak of an H100 SXM in {precision}"
        )
    reference = PEAKS[("H100",)]
    how = f"the step measured on one {gpu}, divided by {GPUS}"
    if known != reference:
        how += f", scaled by peak bf16 TFLOP/s, {known / 1e12:.0f} to {reference / 1e12:.0f}"
    return speed.step(operations / GPUS) * known / reference, how
