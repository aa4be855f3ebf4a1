"""Images/s of the trainer relative to a bare loop with the same network and loss, interleaved in one process.

    python benchmarks/training/overhead.py --json benchmarks/results/trainer.json

The bare loop keeps all images and states in two tensors, without order, reproducible noise, prefetching, stores or EMA.
It draws samples, levels and noise from torch's generator, and computes the forward and backward passes, the extra
evaluations of a chain of length 2, and the fused Adam step. Rounds of the trainer, with each store, and of the bare
loop alternate, so that changes of the machine's speed affect all of them equally. Ratios are medians over rounds.
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
from udddm import networks
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

    def noised(x0: torch.Tensor, eps: torch.Tensor, at: Coefficients) -> torch.Tensor:
        return at.alpha[:, None, None, None] * x0 + at.sigma[:, None, None, None] * eps

    def step() -> None:
        rows = torch.randint(len(images), (batch,))
        x0, target, eps = images[rows], state[rows], torch.randn(batch, *images.shape[1:])
        level = torch.randint(1, levels.shape[1], (batch,))
        first = torch.arange(batch // 2)
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
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 1, 28, 28), np.uint8)
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *STORES)}
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
        for round_number in range(arguments.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                for _ in range(arguments.steps):
                    step()
                if round_number:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - began)
        for kind in STORES:
            counters = trainers[kind].store.counters
            waits[kind] = (counters.read_wait + counters.write_wait) / sum(seconds[kind])
            inputs[kind].close()
            trainers[kind].store.close()
    images_per_round = arguments.steps * config.train.batch_size
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    head = about()
    result = {
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "images_per_second": {name: round(images_per_round / value, 1) for name, value in medians.items()},
        "ratio_to_bare": {
            kind: round(statistics.median(b / t for b, t in zip(seconds["bare"], seconds[kind], strict=True)), 3)
            for kind in STORES
        },
        "store_wait_fraction": {kind: round(value, 4) for kind, value in waits.items()},
    }
    print(heading(head))
    print(f"{'':8} images/s  of bare  store wait")
    for name, rate in result["images_per_second"].items():
        ratio = result["ratio_to_bare"].get(name, 1.0)
        print(f"{name:8} {rate:8.1f}  {ratio:7.3f}  {waits.get(name, 0.0):10.2%}")
    if arguments.json:
        write_json(arguments.json, head, result)


if __name__ == "__main__":
    main()
