"""The time of `Model.sample` relative to the call of the network in it, for one image and for many, interleaved.

    python benchmarks/training/sampling.py --json benchmarks/results/sampling.json

The networks of presets, with random weights. A forward pass is the network's call alone, in inference mode, with
inputs that are ready, for as many images as `Model.sample` draws. One of both is timed after the other, `--rounds`
times; figures are of the fastest of each, because other programs only ever slow them down.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from udddm import networks
from udddm.config import load_config
from udddm.diffusion import schedule
from udddm.runs.model import Model

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

SHAPES = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def timed(action: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(preset: str, count: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds for `count` images by `Model.sample` and by the network alone, and their ratio."""
    config, shape = load_config(preset), SHAPES[preset]
    model = Model(networks.for_run(config, shape).to(device).eval(), schedule.build(config.schedule), config, shape)
    seeds = list(range(count))
    labels = model.default_labels(seeds)
    arguments: list[Any] = [
        torch.randn(count, *shape, device=device),
        torch.zeros(count, device=device),
        torch.randn(count, *shape, device=device) if config.network.conditioned else None,
        None if labels is None else torch.tensor(labels, device=device),
    ]

    @torch.no_grad()
    def forward() -> None:
        model.network(*arguments)

    pairs = []
    for _ in range(rounds + 2):
        pairs.append((timed(lambda: model.sample(seeds), device), timed(forward, device)))
    sampled, passed = zip(*pairs[2:], strict=True)
    return {
        "sample_ms": 1e3 * min(sampled),
        "forward_ms": 1e3 * min(passed),
        "ratio": min(sampled) / min(passed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--presets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    head = about("torch", device=arguments.device)
    print(heading(head))
    print(f"{'preset':<16}{'images':>8}{'sample, ms':>13}{'forward, ms':>13}{'ratio':>8}")
    found = []
    for preset in arguments.presets:
        for count in arguments.counts:
            row = measure(preset, count, arguments.rounds, torch.device(arguments.device))
            found.append({"preset": preset, "images": count, **row})
            print(f"{preset:<16}{count:>8}{row['sample_ms']:>13.2f}{row['forward_ms']:>13.2f}{row['ratio']:>8.2f}")
    if arguments.json:
        write_json(arguments.json, head, {"rows": found})


if __name__ == "__main__":
    main()
