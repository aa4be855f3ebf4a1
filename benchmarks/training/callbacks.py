"""Images/s of a run with each logger relative to the same run without one, interleaved.

    python benchmarks/training/callbacks.py --json benchmarks/results/callbacks.json

Each round trains the digits preset without loggers and with each of them for `--steps` steps, in an order that
rotates. Metrics go to the loggers every 50 steps, as by default, and pictures of 64 samples twice in a run. Weights
& Biases is offline, and MLflow writes files. Ratios are medians over the rounds, and the range is theirs. On a busy
machine they say little; the share of the run's time in the calls of a logger does not depend on what else runs,
but leaves out what its own threads and processes take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import udddm
from udddm.training import trainer
from udddm.training.callbacks import Callbacks

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

SAMPLES = 1797
"""Images of the digits."""
LOGGERS: tuple[tuple[str, ...], ...] = ((), ("tensorboard",), ("wandb",), ("mlflow",))


def name_of(loggers: tuple[str, ...]) -> str:
    return ", ".join(loggers) or "none"


class Timed(Callbacks):
    """Callbacks whose calls during training are timed."""

    seconds = 0.0

    def _call(self, method: str, *arguments: Any) -> None:
        began = time.perf_counter()
        super()._call(method, *arguments)
        if method not in ("on_start", "on_end"):
            Timed.seconds += time.perf_counter() - began


def measure(loggers: tuple[str, ...], steps: int, threads: int) -> tuple[float, float]:
    """Images/s of a run from its first to its last step, and the share of that time spent in calls of the logger."""
    changes: dict[str, Any] = {
        "train.steps": steps,
        "train.torch_threads": threads,
        "sample.every_steps": steps // 2,
        "sample.final": 0,
        "store.kind": "gpu",
        "loggers": list(loggers),
    }
    with tempfile.TemporaryDirectory() as directory:
        Timed.seconds = 0.0
        result = udddm.train("digits", run_dir=Path(directory) / "run", device="cpu", overrides=changes)
    images = result.epochs * SAMPLES
    return result.images_per_second, Timed.seconds * result.images_per_second / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    trainer.Callbacks = Timed  # type: ignore[attr-defined]
    measure((), 20, arguments.threads)
    rates: dict[str, list[float]] = {name_of(each): [] for each in LOGGERS}
    shares: dict[str, list[float]] = {name_of(each): [] for each in LOGGERS}
    for turn in range(arguments.rounds):
        for place in range(len(LOGGERS)):
            loggers = LOGGERS[(place + turn) % len(LOGGERS)]
            found_rate, share = measure(loggers, arguments.steps, arguments.threads)
            rates[name_of(loggers)].append(found_rate)
            shares[name_of(loggers)].append(share)
    head = about("torch", "tensorboard", "wandb", "mlflow-skinny")
    print(heading(head))
    print(f"{'loggers':<16}{'images/s':>10}{'over none':>12}   {'range':<16}{'time in calls':>14}")
    found: dict[str, dict[str, Any]] = {}
    for name, values in rates.items():
        ratios = [value / none for value, none in zip(values, rates["none"], strict=True)]
        middle = statistics.median(ratios)
        found[name] = {"images_per_second": statistics.median(values), "over_none": middle, "ratios": ratios}
        found[name]["share_in_calls"] = share = statistics.median(shares[name])
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:<16}{statistics.median(values):>10.0f}{middle:>12.3f}   {spread:<16}{share:>13.2%}")
    if arguments.json:
        write_json(arguments.json, head, {"steps": arguments.steps, "threads": arguments.threads, "loggers": found})


if __name__ == "__main__":
    main()
