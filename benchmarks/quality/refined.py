"""Refined pairs (docs/method.md) beside the same objective without them: sample quality, paired by seed.

    python benchmarks/quality/refined.py run --arms ict ict-refined --seeds 20 21 22 23 24
    python benchmarks/quality/refined.py report
    python benchmarks/quality/refined.py speed      # images/s relative to the same objective without refined pairs

Each arm is a preset of --data with some settings changed, trained on --images images. It is scored at 1, 2 and 4
evaluations, and along the way at one, with the yardstick's network (benchmarks/yardstick; lower is better). Each row is
written to --json as soon as it is complete, and existing rows are not repeated. The report compares arms by the mean
over seeds of the logarithm of their ratio, with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from study import DATA, configured, run

from udddm.backends.distributed.ranks import join
from udddm.data import ImageDataset, load_dataset
from udddm.runs.run import Run
from udddm.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import ROOT, about, device_name, write_json

ICT = ["objective={name: ict, pretrain: 0.2}"]
ECT = ["objective={name: ect, pretrain: 0.4}"]


def refined(**settings: object) -> list[str]:
    values = {"share": 0.5, "above": 0.8} | settings
    return [f"objective.refined.{key}={value}" for key, value in values.items()]


STORES = ("gpu", "pinned", "zarr")
BASES = {"ict": ICT, "ect": ECT}
VARIANTS: dict[str, list[str]] = {
    "": [],
    "refined": refined(),
    "share-0.3": refined(share=0.3),
    "above-0.3": refined(above=0.3),
    "above-3": refined(above=3),
    "all-levels": refined(above=0),
    "length-3": refined(share=0.66, length=3),
    "length-4": refined(share=0.75, length=4),
    "start-0.2": refined(start=0.2),
    "start-0.5": refined(start=0.5),
    "sharp-0.5": refined(min_sharpness=0.5),
    "sharp-0.8": refined(min_sharpness=0.8),
    "clamped": [*refined(), "store.dtype=uint8"],
    "network": refined(source="network"),
    "network-all-levels": refined(source="network", above=0),
    "condition": [
        *refined(use="condition", above=0),
        "network.condition=channels",
        "sample.sampler=algorithm-2",
    ],
}
ARMS = {f"{base}-{name}".rstrip("-"): [*sets, *more] for base, sets in BASES.items() for name, more in VARIANTS.items()}
ARMS |= {
    "ict-best-of-2": ["objective={name: 'couplings:BestOfK', pretrain: 0.2, settings: {k: 2}}"],
    "ict-best-of-8": ["objective={name: 'couplings:BestOfK', pretrain: 0.2, settings: {k: 8}}"],
    "ict-batch-ot": ["objective={name: 'couplings:BatchOT', pretrain: 0.2}"],
}
"""Arms without a variant are the baselines. "clamped" stores the state in 8 bits, which clamps it to [-1, 1].
"condition" has the estimate as its condition and is sampled with Algorithm 2, also at eight evaluations.
"best-of-k" and "batch-ot" choose the noise for the images (couplings.py, for the digits)."""


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The geometric mean of ratios and its 95 % interval; the interval is (nan, nan) for a single ratio."""
    from scipy.stats import t

    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def compared(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Every arm beside its baseline, for each number of images."""
    found = []
    groups: dict[tuple[int, str], dict[int, Any]] = {}
    for row in rows.values():
        groups.setdefault((row["budget"], row["arm"]), {})[row["seed"]] = row["evaluations"]
    for (budget, arm), by_seed in sorted(groups.items()):
        base = groups.get((budget, arm.split("-")[0]), {})
        seeds = sorted(set(by_seed) & set(base))
        line: dict[str, Any] = {"images": budget, "arm": arm, "seeds": sorted(by_seed)}
        for count in next(iter(by_seed.values())):
            values = [by_seed[seed][count] for seed in sorted(by_seed)]
            line[count] = {
                "fd": statistics.fmean(v["fd"] for v in values),
                "deviation": statistics.stdev(v["fd"] for v in values) if len(values) > 1 else None,
                "recall": statistics.fmean(v["recall"] for v in values),
                "precision": statistics.fmean(v["precision"] for v in values),
            }
            if seeds and by_seed is not base:
                ratios = [by_seed[seed][count]["fd"] / base[seed][count]["fd"] for seed in seeds]
                line[count]["ratio"] = interval(ratios)
        found.append(line)
    return found


def show(lines: list[dict[str, Any]]) -> None:
    heads = "".join(f"{f'{n} evaluations':38}" for n in (1, 2, 4, 8))
    print(f"images   arm                 seeds  recall  {heads}".rstrip())
    for line in lines:
        cells = []
        for count in ("1", "2", "4", "8"):
            if (at := line.get(count)) is None:
                continue
            text = f"{at['fd']:6.1f}" + (f" ± {at['deviation']:.1f}" if at["deviation"] is not None else "")
            if "ratio" in at:
                mean, low, high = at["ratio"]
                text += f", {mean:.2f} x" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")
            cells.append(f"{text:38}")
        recall = line["1"]["recall"]
        row = f"{line['images']:7}  {line['arm']:18}  {len(line['seeds']):5}  {recall:6.3f}  {''.join(cells)}"
        print(row.rstrip(), flush=True)


def speed(data: str, rounds: int, steps: int, directory: Path) -> dict[str, Any]:
    """Images/s of training with refined pairs on each store, over those of the same objective without them.

    All runs are in this process and take turns, `steps` steps each in every round, so that changes of the machine's
    speed affect all of them equally. The first round warms up. Returns the ratios of each round and their medians,
    also of the CPU time of all threads, which other processes affect less.
    """
    plain = ["objective={name: ict, pretrain: 0}", "evaluate.every_steps=0"]
    kinds = {"without": plain} | {store: [*plain, *refined(), f"store.kind={store}"] for store in STORES}
    trainers, inputs = {}, {}
    for name, sets in kinds.items():
        config = configured(DATA[data], sets, 6000, 0)
        torch.set_num_threads(1)
        images = ImageDataset(load_dataset(config.data))
        trainers[name] = Trainer(config, images, Run(directory / name), join("cpu"))
        inputs[name] = trainers[name].begin()
    found: dict[str, dict[str, list[float]]] = {what: {store: [] for store in STORES} for what in ("rate", "cpu")}
    names = list(kinds)
    for number in range(rounds + 1):
        spent = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                trainers[name].train_step(inputs[name])
            spent[name] = {"rate": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        for what, ratios in found.items() if number else ():
            for store in STORES:
                ratios[store].append(spent["without"][what] / spent[store][what])
    for name in names:
        inputs[name].close()
        trainers[name].store.close()
    medians = {what: {store: statistics.median(each) for store, each in by.items()} for what, by in found.items()}
    return {"ratios": found["rate"], "median": medians["rate"], "median_cpu": medians["cpu"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=["run", "report", "speed"])
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["ict", "ict-refined"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--images", type=int, default=384_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="steps of each run in a round of the speed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where runs are trained")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/refined-<data>.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "refined", help="where the runs are kept")
    arguments = parser.parse_args()
    path: Path = arguments.json or ROOT / "benchmarks" / "results" / f"refined-{arguments.data}.json"

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        return found

    if arguments.suite == "speed":
        with tempfile.TemporaryDirectory() as scratch:
            found = speed(arguments.data, arguments.rounds, arguments.steps, Path(scratch))
        for label, key in (("images/s", "median"), ("CPU time", "median_cpu")):
            print(f"{label}  " + "  ".join(f"{store} {ratio:.3f}" for store, ratio in found[key].items()))
        target = arguments.json or ROOT / "benchmarks" / "results" / f"refined-speed-{arguments.data}.json"
        write_json(target, about(), {"steps": arguments.steps, **found})
        return
    for seed in arguments.seeds if arguments.suite == "run" else ():
        for arm in arguments.arms:
            key = f"{arm} | {arguments.images} | {seed}"
            if key in read()["rows"]:
                continue
            directory = arguments.runs / arguments.data / key.replace(" | ", "-")
            row = run(DATA[arguments.data], ARMS[arm], arguments.images, seed, directory, arguments.device)
            book = read()  # another process may have added rows
            book["rows"][key] = {"arm": arm, "budget": arguments.images, "seed": seed, **row}
            book.update(about(device=device_name(arguments.device)), data=arguments.data)
            write_json(path, {}, book)
            print(key, "  ".join(f"{n}: {s['fd']:.1f}" for n, s in row["evaluations"].items()), flush=True)
    show(compared(read()["rows"]))


if __name__ == "__main__":
    main()
