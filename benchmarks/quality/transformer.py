"""DiT and the U-Net on Fashion-MNIST: sample quality after equal time, paired by seed.

    python benchmarks/quality/transformer.py run --minutes 60 --seeds 0 1 2
    python benchmarks/quality/transformer.py report

The U-Net is that of the preset `fashion-mnist`; each DiT has about as many parameters. Everything else is the preset's,
and was chosen for the U-Net. First, short runs of all arms alternate, and the median of their images/s, by phase, sets
how many images each arm trains on in --minutes on one core; the rates are measured once and kept. Each arm is scored at
1, 2 and 4 evaluations, and along the way at one, with the yardstick's network (benchmarks/yardstick; lower is better).
Each row is written to --json as soon as it is complete, and existing rows are not repeated. The report compares arms
with the U-Net by the mean over seeds of the logarithm of their ratio, with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from refined import interval
from study import Data, configured, run

import udddm
from udddm import objectives
from udddm.networks.cost import cost

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import ROOT, about, heading, write_json, write_report

DATA = Data("fashion-mnist", (), "features:fashion_mnist", 60_000, 2000, 0, 0)
SHAPE = (1, 28, 28)
UNUSED = [
    "network.patch=1",
    "network.base_channels=128",
    "network.channel_mult=1,2,2,2",
    "network.blocks_per_level=3",
    "network.attention_resolutions=16,8",
]
"""The defaults of the keys that the preset sets and DiT does not use."""
ARMS = {
    "unet": [],
    "dit-patch-2": [*UNUSED, "network.name=dit", "network.settings={patch: 2, width: 128, depth: 5, heads: 4}"],
    "dit-patch-4": [*UNUSED, "network.name=dit", "network.settings={patch: 4, width: 128, depth: 5, heads: 4}"],
}


PHASES = {"denoiser": ["objective.name=edm"], "ect": ["objective.pretrain=0"]}
"""The two phases of a run of the preset, which take different times per image."""


def rates(rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Images/s over a run of each arm, its parameters and operations. Short runs alternate; their order rotates."""
    kinds = [(arm, phase) for arm in ARMS for phase in PHASES]
    found: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            start = number % len(kinds)
            for arm, phase in kinds[start:] + kinds[:start]:
                run_dir = Path(scratch) / f"{arm}-{phase}-{number}"
                config = configured(DATA, [*ARMS[arm], *PHASES[phase], "evaluate.every_steps=0"], steps, number)
                found[arm, phase].append(udddm.train(config, run_dir=run_dir, device="cpu").images_per_second)
                shutil.rmtree(run_dir)
    rows = {}
    for arm in ARMS:
        config = configured(DATA, ARMS[arm], steps, 0)
        counted, share = cost(config.network, SHAPE), objectives.pretrain_share(config)
        denoiser, ect = (statistics.median(found[arm, phase]) for phase in PHASES)
        rows[arm] = {
            "images_per_second": 1 / (share / denoiser + (1 - share) / ect),
            "of_phases": {phase: found[arm, phase] for phase in PHASES},
            "parameters": counted.parameters,
            "training_operations": counted.training,
        }
    return rows


def lines(book: dict[str, Any]) -> list[str]:
    """The table: every arm, and beside it its ratio to the U-Net."""
    found = ["arm             parameters  MFLOP/image  images/s"]
    for arm, row in book["rates"].items():
        operations = row["training_operations"] / 1e6
        found.append(f"{arm:14} {row['parameters']:11,} {operations:12.0f} {row['images_per_second']:9.0f}")
    groups: dict[float, dict[str, dict[int, Any]]] = {}
    for row in book["rows"].values():
        groups.setdefault(row["minutes"], {}).setdefault(row["arm"], {})[row["seed"]] = row["evaluations"]
    for minutes, by_arm in sorted(groups.items()):
        found += ["", f"fd after {minutes:g} minutes of one core", f"{'arm':14} seeds  {'1 evaluation':34}2{'':33}4"]
        for arm, by_seed in by_arm.items():
            cells = []
            for count in ("1", "2", "4"):
                fds = [scores[count]["fd"] for scores in by_seed.values()]
                text = f"{statistics.fmean(fds):.1f}" + (f" ± {statistics.stdev(fds):.1f}" if len(fds) > 1 else "")
                base = by_arm.get("unet", {})
                if arm != "unet" and (shared := sorted(set(base) & set(by_seed))):
                    ratios = [by_seed[seed][count]["fd"] / base[seed][count]["fd"] for seed in shared]
                    mean, low, high = interval(ratios)
                    text += f", {mean:.2f} x" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")
                cells.append(f"{text:34}")
            found.append(f"{arm:14} {len(by_seed):5}  {''.join(cells)}".rstrip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=["run", "report"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only measure the rates")
    parser.add_argument("--minutes", type=float, default=60, help="time of a run on one core, by the measured rate")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm that measure its rate")
    parser.add_argument("--steps", type=int, default=60, help="length of a run that measures a rate")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "transformer.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "transformer", help="where the runs are kept")
    arguments = parser.parse_args()
    path: Path = arguments.json

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rates": {}, "rows": {}}
        return found

    if arguments.suite == "run" and not read()["rates"]:
        write_json(path, about(), read() | {"rates": rates(arguments.rounds, arguments.steps)})
    for seed in arguments.seeds if arguments.suite == "run" else ():
        for arm in arguments.arms:
            key = f"{arm} | {arguments.minutes:g} minutes | {seed}"
            if key in read()["rows"]:
                continue
            images = round(read()["rates"][arm]["images_per_second"] * 60 * arguments.minutes)
            directory = arguments.runs / key.replace(" | ", "-").replace(" ", "-")
            row = run(DATA, ARMS[arm], images, seed, directory)
            book = read()  # another process may have added rows
            book["rows"][key] = {"arm": arm, "minutes": arguments.minutes, "seed": seed, **row}
            write_json(path, {}, book | about())
            print(key, "  ".join(f"{n}: {s['fd']:.1f}" for n, s in row["evaluations"].items()), flush=True)
    book = read()
    table = lines(book)
    print("\n".join(table))
    write_report(path, {}, book, [heading(book), *table])


if __name__ == "__main__":
    main()
