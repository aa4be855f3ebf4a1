"""Estimates the time of a step from a measured micro-batch.

A full step of a large network may take more memory or time than the planning machine has. So the forward and backward
pass of a micro-batch is measured, and scaled in proportion to the counted operations.
"""

from __future__ import annotations

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

UTILISATION = 0.15
"""The fraction of a GPU's peak that training is assumed to reach if it was not measured. EDM's ImageNet-64 run reached
it (github.com/NVlabs/edm: 2,500 M images in 13 days on 32 A100, with a network of the same cost as that of the preset
imagenet-64); the preset cifar10 with 128 images reaches 12% on an H200, and 17% compiled (docs/gpu.md)."""
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
    """Operations per image: the trained pass, and `teacher` forward passes for targets."""
    return cost.training + teacher * cost.forward


def teacher_share(visit: Objective, teacher: Teacher, samples: int, epochs: float) -> float:
    """Forward passes for targets per visit, averaged over a run of `epochs` epochs: above 1 only with guidance."""
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
