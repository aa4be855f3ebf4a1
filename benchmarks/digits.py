"""What the digits demo makes, and what Algorithm 1 as printed makes of the same data, time and nearly the same network.

    python benchmarks/digits.py --json benchmarks/results/digits.json --grids benchmarks/results

Trains configs/digits.yaml, the same with a network that takes a conditioning image (cross-attention), and Algorithm 1
on that second network, which needs the condition, for as many steps as take it the first run's time. Each is scored by
the yardstick (benchmarks/yardstick: Frechet distance in the feature space of a small classifier; lower is better) on
1,000 samples at one and at two evaluations.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
CONDITIONED = ["network.condition=cross-attention", "network.attention=[4]"]
NAMES = ("chain", "chain, conditioned network", "Algorithm 1")


def command(module: str, *arguments: str) -> None:
    code = f"import sys; from udddm import cli; sys.exit(cli.{module}())"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def yardstick(samples: Path) -> dict[str, Any]:
    script = ROOT / "benchmarks" / "yardstick" / "yardstick.py"
    done = subprocess.run([sys.executable, script, "digits", samples], check=True, capture_output=True, text=True)
    score: dict[str, Any] = json.loads(done.stdout)
    return score


def train(run: Path, overrides: list[str]) -> float:
    """Minutes."""
    began = time.perf_counter()
    sets = [part for override in overrides for part in ("--set", override)]
    command("train", "--config", str(ROOT / "configs" / "digits.yaml"), "--run-dir", str(run), *sets)
    return (time.perf_counter() - began) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--demo", type=Path, help="a finished run of configs/digits.yaml to use instead of training one"
    )
    parser.add_argument("--only", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grids", type=Path, help="where the sample grids are copied to")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        per_step: dict[str, dict[str, float]] = {}
        for name in (n for n in NAMES if n in arguments.only):
            run = Path(directory) / name.replace(", ", "-").replace(" ", "-").lower()
            overrides = [*arguments.set]
            if name != "chain":
                overrides += CONDITIONED
            if name == "Algorithm 1":
                overrides += ["objective.name=algorithm-1", "objective.huber_c=0.00015"]
                probe = [*overrides, "train.steps=100", "sample={every_steps: 0, final: 0}"]
                train(run.with_name("probe"), probe)
                speed = json.loads((run.with_name("probe") / "result.json").read_text())["images_per_second"]
                first = next(iter(per_step.values()))
                overrides.append(f"train.steps={round(first['seconds'] * speed / first['images_per_step'])}")
            if name == "chain" and arguments.demo:
                run, minutes = arguments.demo, None
            else:
                minutes = train(run, overrides)
            result = json.loads((run / "result.json").read_text())
            images = 1797 * result["epochs"]
            per_step[name] = {
                "seconds": images / result["images_per_second"],
                "images_per_step": images / result["steps"],
            }
            two = run.with_name(run.name + "-two")
            command("sample", "--checkpoint", str(run), "--seeds", "0-999", "--steps", "2", "--out", str(two))
            rows[name] = {
                "steps": result["steps"],
                "training_minutes": round(per_step[name]["seconds"] / 60, 2),
                "with_start_and_sampling_minutes": None if minutes is None else round(minutes, 2),
                "images_per_second": round(result["images_per_second"], 1),
                "store_wait_fraction": result["store_wait_fraction"],
                "one_evaluation": yardstick(run / "samples.npy"),
                "two_evaluations": yardstick(two / "samples.npy"),
            }
            if arguments.grids:
                arguments.grids.mkdir(parents=True, exist_ok=True)
                (arguments.grids / f"digits-{run.name}.png").write_bytes((run / "samples.png").read_bytes())
    print(f"{'':28} {'steps':>6} {'minutes':>8} {'fd 1':>8} {'fd 2':>8} {'recall':>7}   (noise 835, real 2.7)")
    for name, row in rows.items():
        one, second = row["one_evaluation"], row["two_evaluations"]
        print(
            f"{name:28} {row['steps']:6} {row['training_minutes']:8.2f} {one['fd']:8.1f} {second['fd']:8.1f} "
            f"{one['recall']:7.2f}"
        )
    if arguments.json:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"date": date.today().isoformat(), "machine": machine, "runs": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
