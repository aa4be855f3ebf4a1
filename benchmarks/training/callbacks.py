"""Images/s of a run with each logger relative to the same run without one, interleaved.

    python benchmarks/training/callbacks.py --json benchmarks/results/callbacks.json

Each round trains the digits preset without loggers and with each of them for `--steps` steps, in an order that
rotates. Metrics go to the loggers every 50 steps, as by default, and pictures of 64 samples twice in a run. Weights &
Biases is offline, and MLflow writes files. Ratios are medians over the rounds, and the range is theirs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import udddm

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

LOGGERS: tuple[tuple[str, ...], ...] = ((), ("tensorboard",), ("wandb",), ("mlflow",))


def name_of(loggers: tuple[str, ...]) -> str:
    return ", ".join(loggers) or "none"


def rate(loggers: tuple[str, ...], steps: int, threads: int) -> float:
    """Images/s of a run from its first to its last step."""
    changes: dict[str, Any] = {
        "train.steps": steps,
        "train.torch_threads": threads,
        "sample.every_steps": steps // 2,
        "sample.final": 0,
        "store.kind": "gpu",
        "loggers": list(loggers),
    }
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        return udddm.train("digits", run_dir=run, device="cpu", overrides=changes).images_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    rate((), 20, arguments.threads)
    rates: dict[str, list[float]] = {name_of(each): [] for each in LOGGERS}
    for turn in range(arguments.rounds):
        for place in range(len(LOGGERS)):
            loggers = LOGGERS[(place + turn) % len(LOGGERS)]
            rates[name_of(loggers)].append(rate(loggers, arguments.steps, arguments.threads))
    head = about("torch", "tensorboard", "wandb", "mlflow-skinny")
    print(heading(head))
    print(f"{'loggers':<16}{'images/s':>10}{'over none':>12}   range")
    found = {}
    for name, values in rates.items():
        ratios = [value / none for value, none in zip(values, rates["none"], strict=True)]
        middle = statistics.median(ratios)
        found[name] = {"images_per_second": statistics.median(values), "over_none": middle, "ratios": ratios}
        print(f"{name:<16}{statistics.median(values):>10.0f}{middle:>12.3f}   {min(ratios):.3f} to {max(ratios):.3f}")
    if arguments.json:
        write_json(arguments.json, head, {"steps": arguments.steps, "threads": arguments.threads, "loggers": found})


if __name__ == "__main__":
    main()
