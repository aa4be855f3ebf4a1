"""How long a step takes: measured here on a part of it, and what that means for a whole step and for 8 H100.

A whole step of a large network may need more memory, or more hours, than the machine has on which a run is planned. So
the forward and backward pass is measured on a micro-batch, and scaled in proportion to the operations counted.
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
"""The share of `PEAK` that training is assumed to reach where no GPU was measured: what EDM's ImageNet-64 run comes to
(github.com/NVlabs/edm: 2,500 M images in 13 days on 32 A100, of a network that costs what that of
configs/imagenet-64.yaml does)."""
PEAKS = {
    ("H100", "PCIe"): 756e12,
    ("H100",): 989e12,
    ("H200",): 989e12,
    ("A100",): 312e12,
    ("L4",): 121e12,
    ("V100",): 125e12,
    ("T4",): 65e12,
}
"""Dense bf16 (V100 and T4: fp16) FLOP/s of GPUs by words of their name, the first that fits. (NVIDIA's data sheets.)"""
SHORTEST = 10e-3
"""Seconds: a step that would be shorter by its operations alone is bound by the start of some thousand kernels."""

_OPERATIONS = {"cpu": 3e11, "cuda": 1e14}
"""A micro-batch has about so many: seconds on a slow core, a fraction of one on a GPU."""
_ENOUGH = 5.0  # seconds of measuring, after which no further pass is begun
_PASSES = 3
_EPOCHS, _VISITS = 16, 1024  # over which the teacher's share is averaged


@dataclass(frozen=True)
class Speed:
    """A measured forward and backward pass of a micro-batch, and the optimizer's step after it. Seconds."""

    images: int
    operations: float
    """Counted for the micro-batch."""
    passes: float
    update: float

    def step(self, operations: float) -> float:
        """Seconds of a step with passes of so many operations."""
        return self.passes * operations / self.operations + self.update


def an_image(cost: Cost, teacher: float) -> float:
    """Operations an image: the trained pass, and the teacher's forward pass on a share `teacher` of the visits."""
    return cost.training + teacher * cost.forward


def teacher_share(visit: Objective, teacher: Teacher, samples: int, epochs: float) -> float:
    """Rows that the network evaluates for targets, as a share of the visits, averaged over a run of `epochs` epochs."""
    ids = np.unique(np.linspace(0, samples - 1, _VISITS).astype(np.int64))
    chosen = np.unique(np.linspace(0, max(0.0, np.ceil(epochs) - 1), _EPOCHS).astype(np.int64))
    return float(np.mean([teacher.evaluated(visit.plan(ids, int(epoch))) / len(ids) for epoch in chosen]))


def emulated(config: RunConfig, ranks: Ranks) -> bool:
    """Whether the run's precision is too slow here to be measured."""
    return ranks.device.type == "cpu" and config.train.precision == "fp16"


def measure(
    config: RunConfig, data: ExpectConfig, order: Order, ranks: Ranks, steps: int, visit: Objective, cost: Cost
) -> Speed:
    """Take some steps of a micro-batch on black images, whose speed is that of any others, and keep the best.

    The micro-batch is as large as a rank's part of a step, or less: what fits the device's memory and a few seconds.
    On a CPU it is fp32 where the run is fp16, for which most CPUs have no instructions.
    """
    if emulated(config, ranks):
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    engine = build_engine(networks.for_run(config, data.shape), config, ranks, steps)
    averages = ema.build(config.train, engine.weights())
    teacher = teacher_of(config, equal_forward_calls=engine.equal_forward_calls)
    every = order.batch_of(order.lanes_of(ranks.rank, ranks.world_size), 0, 0).ids
    most = int(_OPERATIONS[ranks.device.type] / an_image(cost, 1))
    images = max(1, min(most, samples_a_part(config, ranks.world_size)))
    passes: list[float] = []
    updates: list[float] = []
    warm = False  # the first pass compiles, chooses kernels and makes room, and is not a step's time
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
    """`PEAKS` of the device that CUDA calls `name`; None where it is not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    return next((flops for parts, flops in PEAKS.items() if words.issuperset(parts)), None)


def on_h100s(speed: Speed, operations: float, precision: str, gpu: str | None) -> tuple[float | None, str]:
    """Seconds of a step of so many operations on 8 H100, and how that was found; None and the reason where that would
    say nothing. `gpu` is what CUDA calls the device that was measured, if there was one. Communication is left out."""
    known = peak(gpu) if gpu else None
    if known is None:
        seconds = operations / (GPUS * PEAK[precision] * UTILISATION)
        if seconds < SHORTEST:
            return None, "not measured, and so small a step says nothing of its time: starting kernels takes longer"
        return seconds, (
            f"not measured: counted operations at an assumed {UTILISATION:.0%} of the {PEAK[precision] / 1e12:.0f} "
            f"TFLOP/s peak of an H100 SXM in {precision}"
        )
    reference = PEAKS[("H100",)]
    how = f"the step measured on one {gpu}, divided over {GPUS}"
    if known != reference:
        how += f", scaled by peak bf16 TFLOP/s, {known / 1e12:.0f} to {reference / 1e12:.0f}"
    return speed.step(operations / GPUS) * known / reference, how
