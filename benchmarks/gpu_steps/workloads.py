"""What several steps use: configurations, made-up data, the device's part of a training step, clocks and digests."""

from __future__ import annotations

import hashlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gpu_steps.harness import Bench
from udddm import config as configuration
from udddm import ema, networks, objectives
from udddm.backends import engines
from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig, TrainConfig
from udddm.data import ArrayImages, ImageDataset
from udddm.diffusion import schedule
from udddm.runs.run import Run
from udddm.training.inputs import Prefetch
from udddm.training.trainer import Trainer

Shape = tuple[int, int, int]
TINY = (
    "network={base_channels: 32, channel_mult: [1, 2], blocks_per_level: 1, attention_resolutions: [4], dropout: 0, "
    "condition: none}",
    "train={steps: 1000, batch_size: 16, learning_rate: 1.0e-4, ema: [0.9], channels_last: false, cuda_graphs: false}",
    "sample={every_steps: 0, final: 0}",
)
TINY_SHAPE: Shape = (1, 8, 8)
SMALLER = (
    "network.base_channels=32",
    "network.channel_mult=[1, 2]",
    "network.blocks_per_level=1",
    "network.attention_resolutions=[16]",
)
"""A preset for 32x32 pixels at a size for a test."""


def tiny(*settings: str) -> RunConfig:
    """A network that a CPU trains in milliseconds."""
    return configuration.load_config(None, [*TINY, *settings])


def preset(name: str, *settings: str) -> RunConfig:
    """A preset of the package."""
    return configuration.load_config(name, list(settings))


def alone(bench: Bench) -> Ranks:
    """The only rank, on the bench's device."""
    return Ranks(0, 1, device_of(bench))


def device_of(bench: Bench) -> torch.device:
    """Touches CUDA: call it in a check."""
    if bench.device != "cuda":
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def no_tf32() -> None:
    """True float32 in convolutions and matrix products."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def pixels(count: int, shape: Shape, classes: int = 0) -> ImageDataset:
    """Random images, with labels if there are classes. `shape` is [C, H, W]."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *shape), np.uint8)
    return ImageDataset(ArrayImages(images, np.arange(count) % classes if classes else None))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_setting(name: str) -> bool:
    """Whether the `train` section of this version has a setting of that name."""
    return name in TrainConfig.model_fields


class Passes:
    """The device's part of a run's steps (passes, optimizer, averages) on random images that stay on the device.

    `teacher`: "planned" takes visits as the objective plans them, "none" plans a denoiser's, "full" has every row's
    target evaluated.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: Shape,
        bench: Bench,
        *,
        batch: int,
        teacher: str = "planned",
        plans: int = 4,
        epoch: int = 0,
    ):
        train: dict[str, Any] = {"batch_size": batch, "grad_accumulation": 1}
        named: dict[str, Any] = {"name": "edm"} if teacher == "none" else {"pretrain": 0.0}
        self.config = config = config.model_copy(
            update={
                "train": config.train.model_copy(update=train),
                "objective": config.objective.model_copy(update=named),
            }
        )
        ranks = alone(bench)
        self.device, self.shape, self.taken = ranks.device, shape, 0
        self.network = networks.for_run(config, shape)
        self.engine = engines.build(self.network, config, ranks, 1_000_000)
        self.teacher = objectives.teacher_of(config, self.engine)
        self.averages = ema.build(config.train, self.engine.weights())
        self.objective = objectives.build(config, schedule.build(config.schedule), 1000.0, shape)
        self.resize(batch, full=teacher == "full", plans=plans, epoch=epoch)

    def resize(self, batch: int, *, full: bool = False, plans: int = 1, epoch: int = 0) -> None:
        """Go on with other images: `batch` a step, and `plans` batches of visits in turn."""
        self.batch = batch
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.rand(batch, *self.shape, generator=generator).mul(2).sub(1).to(self.device)
        self.state = torch.randn(batch, *self.shape, generator=generator).clamp(-1, 1).to(self.device)
        classes = self.config.network.classes
        self.labels = torch.randint(classes, (batch,), generator=generator).to(self.device) if classes else None
        rows = np.arange(batch * plans, dtype=np.int64).reshape(plans, batch)
        made = [self.objective.plan(ids, epoch) for ids in rows]
        self.visits = [self._full(v).to(self.device) if full else v.to(self.device) for v in made]

    @staticmethod
    def _full(visits: objectives.Visits) -> objectives.Visits:
        """All rows evaluated, at the level they have: the same work as at the level below."""
        rows = torch.arange(len(visits.x0_weight))
        return replace(visits, teacher_rows=rows, teacher_coefficients=visits.coefficients)

    def evaluated(self) -> list[int]:
        """How many rows the teacher's pass has, by batch of visits."""
        return [self.teacher.evaluated(visits) for visits in self.visits]

    def without_teacher(self) -> None:
        """Go on with visits whose targets are all stored."""
        self.visits = [
            replace(v, teacher_rows=v.teacher_rows[:0], teacher_coefficients=v.coefficients[:, :0]) for v in self.visits
        ]

    def losses(self, visits: objectives.Visits) -> tuple[torch.Tensor, torch.Tensor]:
        """The forward passes of `visits`: the loss of each sample, and the next x0-state."""
        return objectives.visit_loss(self.engine.module, self.x0, self.state, visits, self.labels, self.teacher)

    def passes(self) -> torch.Tensor:
        """The forward and backward pass. Returns the loss."""
        visits = self.visits[self.taken % len(self.visits)]
        with self.engine.micro_batch(last=True):
            with self.engine.autocast():
                losses, self.state = self.losses(visits)
            loss = losses.mean()
            self.engine.backward(loss)
        return loss.detach()

    def step(self) -> torch.Tensor:
        """A step. Returns its loss."""
        loss = self.passes()
        self.engine.step(self.taken)
        self.taken += 1
        for average in self.averages:
            average.update(self.taken)
        return loss


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a step: the median on the device, and of the host's thread alone."""

    device_ms: float
    host_ms: float

    def rate(self, images: int) -> float:
        """Images a second."""
        return round(images / self.device_ms * 1000, 1)

    def figures(self) -> dict[str, float]:
        return {"device_ms": round(self.device_ms, 3), "host_ms": round(self.host_ms, 3)}


def timed(step: Callable[[], Any], device: torch.device, *, warm: int, count: int) -> Timing:
    """The time of one of `count` steps after `warm` of them: on a GPU by CUDA events, without a wait between steps."""
    for _ in range(warm):
        step()
    synchronize(device)
    hosts: list[float] = []
    if device.type != "cuda":
        for _ in range(count):
            began = time.perf_counter()
            step()
            hosts.append((time.perf_counter() - began) * 1000)
        return Timing(statistics.median(hosts), statistics.median(hosts))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        began = time.perf_counter()
        step()
        hosts.append((time.perf_counter() - began) * 1000)
        event.record()
    synchronize(device)
    spans = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return Timing(statistics.median(spans), statistics.median(hosts))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        row = tensors[name].detach().cpu().contiguous().reshape(-1)
        found.update(name.encode() + row.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def gap(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The largest difference over the largest value of `b`."""
    if set(a) != set(b):
        raise AssertionError(f"not the same tensors: {sorted(set(a) ^ set(b))[:5]}")
    most = max(float(value.abs().max()) for value in b.values())
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in b) / max(most, 1e-30)


@contextmanager
def running(config: RunConfig, dataset: ImageDataset, where: Path, ranks: Ranks) -> Iterator[tuple[Trainer, Prefetch]]:
    """A trainer that has begun, or resumed, in the run directory `where`."""
    trainer = Trainer(config, dataset, Run(where), ranks)
    inputs = trainer.begin()
    try:
        yield trainer, inputs
    finally:
        inputs.close()
        trainer.store.close()


def stepped(config: RunConfig, dataset: ImageDataset, where: Path, ranks: Ranks, until: int) -> dict[str, Any]:
    """Train to step `until` (from a checkpoint, where there is one), save, and return digests and milliseconds."""
    with running(config, dataset, where, ranks) as (trainer, inputs):
        first, began = trainer.step, time.perf_counter()
        warm = began
        while trainer.step < until:
            trainer.train_step(inputs)
            if trainer.step == first + 2:  # the first ones choose and load kernels
                synchronize(ranks.device)
                warm = time.perf_counter()
        synchronize(ranks.device)
        milliseconds = (time.perf_counter() - warm) / max(1, until - first - 2) * 1000
        trainer.save()
        weights = {n: p.float().cpu().clone() for n, p in trainer.engine.weights().items()}
        averages = {f"{a.name}/{n}": p for a in trainer.emas for n, p in a.weights.items()}
        digests = {"weights": digest(weights), "ema": digest(averages), "state": trainer.store.sha256()[:16]}
        return {"digests": digests, "weights": weights, "step_ms": round(milliseconds, 2), "resumed_at": first}


def environment(**values: str) -> None:
    """Set environment variables of this check."""
    os.environ.update(values)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
