"""Images/s of the trainer relative to a bare loop with the same network and loss, interleaved in one process.

    python benchmarks/training/overhead.py --json benchmarks/results/trainer.json

The bare loop keeps all images and states in two tensors, without order, reproducible noise, prefetching, stores or EMA.
It draws samples, levels and noise from torch's generator, and computes the forward and backward passes, the extra
evaluations of a chain of length 2 for as many rows as the trainer has on average, and the fused Adam step. Rounds begin
after the trainers' first epoch, in which all samples are at the start of a chain and need such an evaluation. Rounds of
the trainer, with each store, and of the bare loop alternate in rotating order, so that changes of the machine's speed
affect all of them equally. Ratios are medians over rounds, of images/s and of the CPU time of all threads, which other
processes affect less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from udddm import config as configuration
from udddm import networks, objectives
from udddm.backends.distributed.ranks import join
from udddm.config import RunConfig
from udddm.data import ArrayImages, ImageDataset
from udddm.diffusion.denoise import denoise
from udddm.diffusion.schedule import Coefficients
from udddm.diffusion.schedule import build as build_schedule
from udddm.objectives import pseudo_huber
from udddm.runs.run import Run
from udddm.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

STORES = ("gpu", "pinned", "zarr")
SAMPLES, SHAPE = 2000, (1, 28, 28)


def evaluated_share(config: RunConfig) -> float:
    """The share of rows for which the objective evaluates the network for a target, over some epochs but the first."""
    objective = objectives.build(config, build_schedule(config.schedule), 1000.0, SHAPE)
    plans = [objective.plan(np.arange(SAMPLES), epoch) for epoch in range(1, 5)]
    return statistics.fmean(len(visits.teacher_rows) / SAMPLES for visits in plans)


def bare_loop(config: RunConfig, images: torch.Tensor) -> Callable[[], None]:
    """Returns a function that takes one step."""
    schedule = build_schedule(config.schedule)
    channels, height, width = images.shape[1:]
    network = networks.for_run(config, (channels, height, width))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=config.train.learning_rate, fused=True)
    state = torch.randn_like(images)
    levels = torch.from_numpy(schedule.coefficients(schedule.levels(config.objective.chain.stages[0].levels)))
    batch, c = config.train.batch_size, 0.3
    first = torch.arange(round(evaluated_share(config) * batch))

    def noised(x0: torch.Tensor, eps: torch.Tensor, at: Coefficients) -> torch.Tensor:
        return at.alpha[:, None, None, None] * x0 + at.sigma[:, None, None, None] * eps

    def step() -> None:
        rows = torch.randint(len(images), (batch,))
        x0, target, eps = images[rows], state[rows], torch.randn(batch, *images.shape[1:])
        level = torch.randint(1, levels.shape[1], (batch,))
        with torch.no_grad():
            below = Coefficients(*levels[:, level[first] - 1])
            target[first] = denoise(network, noised(x0[first], eps[first], below), below, None, None)
        at = Coefficients(*levels[:, level])
        output = denoise(network, noised(x0, eps, at), at, None, None)
        loss = pseudo_huber(output, target, c).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        state[rows] = output.detach()

    return step


def ratios(spent: dict[str, list[float]]) -> dict[str, float]:
    """What the bare loop takes over what the trainer takes with each store: the medians over rounds."""
    bare = spent["bare"]
    return {kind: round(statistics.median(b / t for b, t in zip(bare, spent[kind], strict=True)), 3) for kind in STORES}


def waits_of(trainer: Trainer) -> float:
    """The seconds that its steps have waited for the store."""
    counters = trainer.store.counters
    return counters.read_wait + counters.write_wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="steps per round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = configuration.load_config(
        None,
        [
            "network={base_channels: 32, channel_mult: [1, 2], blocks_per_level: 1, attention_resolutions: [], "
            "dropout: 0, condition: none}",
            "objective={huber_c: 0.3, chain: {length: 2, stages: [{start: 0, levels: 16}]}}",
            "train={steps: 1000000, batch_size: 64, learning_rate: 1.0e-3, ema: [0.999]}",
        ],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, *SHAPE), np.uint8)
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *STORES)}
    busy: dict[str, list[float]] = {name: [] for name in ("bare", *STORES)}
    waits: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        steps: dict[str, Callable[[], Any]] = {"bare": bare_loop(config, images)}
        trainers, inputs = {}, {}
        for kind in STORES:
            chosen = config.model_copy(update={"store": config.store.model_copy(update={"kind": kind})})
            trainer = trainers[kind] = Trainer(
                chosen, ImageDataset(ArrayImages(pixels)), Run(Path(directory) / kind), join("cpu")
            )
            inputs[kind] = trainer.begin()
            steps[kind] = partial(trainer.train_step, inputs[kind])
            while trainer.step <= trainer.order.steps_per_epoch:
                steps[kind]()
        steps["bare"]()
        waited = {kind: waits_of(trainers[kind]) for kind in STORES}
        names = list(steps)
        for number in range(arguments.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                began, cpu = time.perf_counter(), time.process_time()
                for _ in range(arguments.steps):
                    steps[name]()
                seconds[name].append(time.perf_counter() - began)
                busy[name].append(time.process_time() - cpu)
        for kind in STORES:
            waits[kind] = (waits_of(trainers[kind]) - waited[kind]) / sum(seconds[kind])
            inputs[kind].close()
            trainers[kind].store.close()
    images_per_round = arguments.steps * config.train.batch_size
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    head = about()
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "images_per_second": {name: round(images_per_round / value, 1) for name, value in medians.items()},
        "ratio_to_bare": ratios(seconds),
        "cpu_time_ratio_to_bare": ratios(busy),
        "store_wait_fraction": {kind: round(value, 4) for kind, value in waits.items()},
    }
    print(heading(head))
    print(f"{'':8} images/s  of bare  in CPU time  store wait")
    for name, rate in result["images_per_second"].items():
        ratio, cpu = (result[key].get(name, 1.0) for key in ("ratio_to_bare", "cpu_time_ratio_to_bare"))
        print(f"{name:8} {rate:8.1f}  {ratio:7.3f}  {cpu:11.3f}  {waits.get(name, 0.0):10.2%}")
    if arguments.json:
        write_json(arguments.json, head, result)


if __name__ == "__main__":
    main()
