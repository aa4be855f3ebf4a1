"""Continuing a trained model with refined pairs, a fresh teacher and a stored teacher (docs/method.md).

    python benchmarks/quality/continued.py run --seeds 0 1 2
    python benchmarks/quality/continued.py report

The release of Fashion-MNIST goes on for four epochs of ECT's last stage, at a gap of 1/256 of the level, with the same
settings but for the teacher. Scores are Frechet distances in the features of the yardstick's classifier at one
evaluation, of 2,000 samples after each epoch. Each run is in --json as soon as it is complete, and is not repeated. The
report compares with the fresh teacher, by the mean over seeds of the logarithm of the ratio, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from refined import interval
from study import BATCH, DATA

import udddm

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import ROOT, about, device_name, write_json

RELEASE = ROOT / "benchmarks" / "results" / "fashion-mnist" / "consistency"
RESULTS = ROOT / "benchmarks" / "results" / "continued-fashion-mnist.json"
EPOCHS = 4
LAST_STAGE = "objective={name: ect, pretrain: 0, ect: {q: 256, stages: 1, length: 1}}"
REFINED = "objective.refined={share: 0.5, above: 0.8}"
ARMS = {"fresh": [], "refined": [REFINED], "stored": ["objective.ect.length=2"]}
BASE = "fresh"


def settings(arm: str, seed: int, rate: float) -> list[str]:
    """The preset `fashion-mnist` continued from the release."""
    steps = DATA["fashion-mnist-full"].samples // BATCH
    return [
        f"seed={seed}",
        f"train.epochs={EPOCHS}",
        f"train.learning_rate={rate}",
        f"train.init_from={RELEASE}",
        "train.ema=[0.9995]",
        "train.ema_warmup=false",
        "schedule.sigma_max=80",
        "store.kind=gpu",
        f"checkpoint.every_steps={EPOCHS * (steps + 1)}",
        "sample.every_steps=0",
        "sample.final=0",
        f"evaluate={{every_steps: {steps}, count: 2000, features: '{DATA['fashion-mnist-full'].features}'}}",
        LAST_STAGE,
        *ARMS[arm],
    ]


def scores(arm: str, seed: int, rate: float, directory: Path, device: str) -> list[dict[str, Any]]:
    """Train a run in `directory`. Its scores, by epoch."""
    udddm.train(udddm.load_config("fashion-mnist", settings(arm, seed, rate)), run_dir=directory, device=device)
    lines = [json.loads(line) for line in (directory / "evaluation.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "fd", "precision", "recall")} for line in lines[:EPOCHS]]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of text: fd by epoch, mean and deviation over seeds, and the ratio to the fresh teacher's."""
    found = {arm: {row["seed"]: row["scores"] for row in rows if row["arm"] == arm} for arm in ARMS}
    base, lines = found[BASE], [f"{'teacher':10}{'seeds':>6}  fd at one evaluation after each epoch"]
    for arm, by_seed in found.items():
        cells = []
        for epoch in range(EPOCHS) if by_seed else ():
            values = {seed: each[epoch]["fd"] for seed, each in by_seed.items()}
            cell = f"{statistics.fmean(values.values()):6.2f}"
            pairs = [value / base[seed][epoch]["fd"] for seed, value in values.items() if seed in base]
            if arm != BASE and pairs:
                mean, low, high = interval(pairs)
                cell += f" {mean:.2f} x" + (f" [{low:.2f}, {high:.2f}]" if len(pairs) > 1 else "")
            cells.append(f"{cell:26}")
        lines.append(f"{arm:10}{len(by_seed):6}  {''.join(cells)}".rstrip())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=["run", "report"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where runs are trained")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "continued", help="where the runs are kept")
    arguments = parser.parse_args()

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": {}}
        return found

    for seed in arguments.seeds if arguments.suite == "run" else ():
        for arm in arguments.arms:
            key = f"{arm} | {arguments.rate:g} | {seed}"
            if key in read()["rows"]:
                continue
            found = scores(arm, seed, arguments.rate, arguments.runs / key.replace(" | ", "-"), arguments.device)
            book = read()  # another process may have added rows
            book["rows"][key] = {"arm": arm, "seed": seed, "learning_rate": arguments.rate, "scores": found}
            write_json(arguments.json, about(device=device_name(arguments.device)), {"rows": book["rows"]})
            print(key, "  ".join(f"{each['fd']:.2f}" for each in found), flush=True)
    print("\n".join(table(list(read()["rows"].values()))))


if __name__ == "__main__":
    main()
