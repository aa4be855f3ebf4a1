"""The study of objectives: sample quality at an equal number of images and at equal time, ablations, negative results.

    python benchmarks/quality/study.py speed                    # images/s of every objective relative to iCT
    python benchmarks/quality/study.py objectives --seeds 0 1 2 # objectives side by side, VE and VP
    python benchmarks/quality/study.py ablations                # one setting changed at a time
    python benchmarks/quality/study.py report                   # tables in Markdown, curves, grids

--data is digits (the default) or fashion-mnist. Every run is scored with the yardstick's network (benchmarks/yardstick:
Frechet distance in the feature space of a small classifier; lower is better). Each row is written to --json as soon as
it is complete, and existing rows are not repeated. Runs use one core (`train.torch_threads` is 1).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import udddm
from udddm import networks, objectives
from udddm.backends import engines
from udddm.backends.distributed.ranks import join
from udddm.config import RunConfig
from udddm.data import ImageDataset, MapDataset, load_dataset
from udddm.diffusion import schedule
from udddm.ema import EMA
from udddm.evaluation import evaluate
from udddm.evaluation.features import extract, load_features

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import ROOT, about, write_json

sys.path.insert(0, str(ROOT / "benchmarks" / "yardstick"))

CONDITIONED = ["network.condition=cross-attention"]
STAGES = "[{start: 0, levels: 8}, {start: 0.2, levels: 16}, {start: 0.4, levels: 32}, {start: 0.6, levels: 64}"
PRETRAIN = 0.4
TUNED = [
    f"objective={{name: chain, pretrain: {PRETRAIN}, huber_c: 0.00432}}",
    "objective.chain.distribution=lognormal",
    "objective.chain.weighting=gap",
    f"objective.chain.stages={STAGES}, {{start: 0.8, levels: 128}}]",
]
"""A chain with the baselines' loss weights, distance, distribution of levels, number of levels and pretraining."""
MANY = f"objective.chain.stages=[{', '.join(f'{{start: {i / 8}, levels: {8 << i}}}' for i in range(8))}]"
"""About as many levels as iCT (1,280), at the same fractions of the run."""
PLAIN = "objective={name: chain, huber_c: 1.5}"
ECT = f"objective={{name: ect, pretrain: {PRETRAIN}}}"
OBJECTIVES: dict[str, list[str]] = {
    "chain L=2, tuned": TUNED,
    "chain L=2, tuned, M to 1024": [*TUNED, MANY],
    "ECT, stored teacher L=2": [ECT, "objective.ect.length=2"],
    "iCT": ["objective={name: ict}"],
    "ECT": [ECT],
    "iCT, warm-up 0.4": [f"objective={{name: ict, pretrain: {PRETRAIN}}}"],
    "chain L=1, tuned (no store)": [*TUNED, "objective.chain.length=1"],
    "chain L=2": [PLAIN],
    "chain L=1 (no store)": [PLAIN, "objective.chain.length=1"],
    "trajectory": [PLAIN, "objective.chain.length=trajectory"],
    "denoiser, Heun": ["objective={name: edm}", "sample.sampler=heun", "sample.steps=9"],
    "Algorithm 1": ["objective={name: uddm}", *CONDITIONED],
}
"""iCT and ECT as published, and iCT after a denoiser; learning rate, batch, EMA and network are the preset's."""
COMPARED = (
    "chain L=2, tuned",
    "chain L=2, tuned, M to 1024",
    "ECT, stored teacher L=2",
    "iCT",
    "ECT",
    "iCT, warm-up 0.4",
)
"""Objectives that run with several seeds; the others run once."""
SCHEDULES = {
    "ve": [],
    "vp": ["schedule.kind=vp", "schedule.timesteps=8000"],
}
ABLATIONS: dict[str, dict[str, list[str]]] = {
    "levels M at the end": {
        "8": ["objective.chain.stages=[{start: 0, levels: 8}]"],
        "1024": [MANY],
        "1024, L = 1": [MANY, "objective.chain.length=1"],
    },
    "chain length L": {
        "1": ["objective.chain.length=1"],
        "4": ["objective.chain.length=4"],
    },
    "coefficients": {
        "paper's kappa": ["schedule.preconditioning=paper"],
        "quadratic kappa": ["schedule.preconditioning=quadratic"],
    },
    "c": {"0.19 sqrt(d)": ["objective.huber_c=1.5"]},
    "levels drawn": {"uniformly": ["objective.chain.distribution=uniform"]},
    "weighting": {"none": ["objective.chain.weighting=none"]},
    "guiding weight": {"1/(n+1), n the level": ["objective.chain.x0_weight=visits"]},
    "warm-up": {"0": ["objective.pretrain=0"], "0.2": ["objective.pretrain=0.2"], "0.6": ["objective.pretrain=0.6"]},
    "learning rate": {"3.5e-4": ["train.learning_rate=3.5e-4"], "1.4e-3": ["train.learning_rate=1.4e-3"]},
    "state's age": {
        "28 steps, ten times the images": ["longer=10"],
        "449 steps, ten times the images": ["longer=10", "repeat=16"],
    },
    "iCT": {
        "as published": ["objective={name: ict}"],
        "levels 10 to 160": ["objective={name: ict, ict: {s1: 160}}"],
        "warm-up 0.2": ["objective={name: ict, pretrain: 0.2}"],
        "warm-up 0.4": ["objective={name: ict, pretrain: 0.4}"],
        "warm-up 0.4, uniformly": ["objective={name: ict, pretrain: 0.4, ict: {distribution: uniform}}"],
    },
    "ten times the images": {
        "iCT": ["objective={name: ict}", "longer=10"],
        "iCT, warm-up 0.4": ["objective={name: ict, pretrain: 0.4}", "longer=10"],
        "ECT": [ECT, "longer=10"],
        "ECT, warm-up 0.2": [ECT, "objective.pretrain=0.2", "longer=10"],
        "ECT, stored teacher L=2": [ECT, "objective.ect.length=2", "longer=10"],
        "chain L=2, tuned, M to 1024": [*TUNED, MANY, "longer=10"],
    },
    "ECT": {
        "as published": [ECT],
        "warm-up 0.2": [ECT, "objective.pretrain=0.2"],
        "no warm-up": [ECT, "objective.pretrain=0"],
        "stored teacher, L = 2": [ECT, "objective.ect.length=2"],
        "stored teacher, L = 2, state in fp32": [ECT, "objective.ect.length=2", "store.dtype=fp32"],
    },
}
"""Each changes one thing of "chain L=2, tuned", VE: L = 2, M to 128, c = 0.00054 sqrt(d), pretraining 0.4, learning
rate 7e-4, a state 28 steps old. "Warm-up" in a name is pretraining; results are kept by these names."""


BATCH = 64
"""The batch size of both presets."""


@dataclass(frozen=True)
class Data:
    preset: str
    overrides: tuple[str, ...]
    features: str
    samples: int
    """The number of images, from the first on, used for training. Samples are scored against the entire data set."""
    count: int
    """The number of samples that are scored."""
    images: int
    """The number of images that iCT trains on by default (--images)."""
    ablated: int
    """The number of images that a run of the ablations trains on."""


DATA = {
    "digits": Data("digits", (), "features:digits", 1797, 1000, 56_000, 32_000),
    "fashion-mnist": Data(
        "fashion-mnist",
        (
            "network.patch=4",
            "network.base_channels=64",
            "network.channel_mult=[1]",
            "network.blocks_per_level=1",
            "train.ema=[0.999]",
        ),
        "features:fashion_mnist",
        6000,
        2000,
        60_000,
        20_000,
    ),
    "fashion-mnist-full": Data("fashion-mnist", (), "features:fashion_mnist", 60_000, 2000, 600_000, 600_000),
}


class Resized:
    """`count` images: the first ones of a data set, or all of them repeatedly. With more images, a state is older
    when it is read."""

    def __init__(self, dataset: MapDataset, count: int):
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Any:
        return self._dataset[index % len(self._dataset)]


def factor(overrides: list[str], name: str) -> int:
    """A setting of this study: `repeat` the data set, or train on that many times the images (`longer`)."""
    return next((int(o.removeprefix(f"{name}=")) for o in overrides if o.startswith(f"{name}=")), 1)


def configured(data: Data, overrides: list[str], steps: int, seed: int) -> RunConfig:
    sets = [o for o in overrides if not o.startswith(("repeat=", "longer="))]
    fixed = [
        f"seed={seed}",
        f"train.steps={steps}",
        "train.epochs=null",
        "objective.refined.share=0",
        "train.torch_threads=1",
        "store.kind=gpu",
        f"checkpoint.every_steps={steps}",
        "sample.every_steps=0",
        "sample.final=0",
        f"evaluate={{every_steps: {max(1, steps // 5)}, count: 1000, features: '{data.features}'}}",
    ]
    return udddm.load_config(data.preset, [*data.overrides, *fixed, *sets])


def run(
    data: Data, overrides: list[str], length: int, seed: int, directory: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Train on `length` images on `device`, and score the samples on the CPU. The run is kept in `directory`."""
    steps = max(8, length * factor(overrides, "longer") // BATCH)
    config = configured(data, overrides, steps, seed)
    dataset = load_dataset(config.data)
    images = Resized(dataset, data.samples * factor(overrides, "repeat"))
    result = udddm.train(config, images, run_dir=directory, device=device)
    model = udddm.load_model(directory, device=device)
    network = load_features(data.features, torch.device("cpu"))
    real = evaluate.reference(ImageDataset(dataset), network)
    by_evaluations = {}
    counts = {"heun": (1, 3, 35), "algorithm-2": (1, 2, 4, 8)}.get(config.sample.sampler, (1, 2, 4))
    for steps in counts:
        sampler = config.sample.sampler
        drawn = model.sample(range(data.count), steps=steps, sampler=sampler)
        if steps in (1, 35):
            np.save(directory / f"samples-{steps}.npy", drawn[:64])
        features, logits = extract(network, torch.split(torch.from_numpy(drawn), 250))
        by_evaluations[str(steps)] = evaluate.score(features, logits, real, network.name)
    curve = [json.loads(line) for line in (directory / "evaluation.jsonl").read_text().splitlines()]
    return {
        "steps": result["steps"],
        "images": result["steps"] * BATCH,
        "evaluations": by_evaluations,
        "curve": [{"images": p["step"] * BATCH, "fd": p["fd"], "recall": p["recall"]} for p in curve],
    }


def speeds(data: Data, names: list[str], rounds: int, ict: float | None, seconds: float = 1.0) -> dict[str, Any]:
    """Images/s of a training step (plan, passes, Adam, EMA). The objectives alternate within every round. Keys with
    `run_` are for an entire run, including pretraining of a denoiser, if any. iCT and the denoiser are always measured;
    ratios are converted to images/s with `ict`, those of iCT from an earlier measurement."""
    ranks = join("cpu")
    torch.set_num_threads(1)
    beside = {"iCT", "denoiser, Heun", *names}
    stepped = {name: _steps(data, OBJECTIVES[name], ranks) for name in OBJECTIVES if name in beside}
    found: dict[str, list[float]] = {name: [] for name in stepped}
    for step in stepped.values():
        for _ in range(3):
            next(step)
    for _ in range(rounds):
        for name, step in stepped.items():
            done, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds or done % 2:
                done += next(step)
            found[name].append(done / spent)
    ict = ict or float(np.median(found["iCT"]))
    ratios = {name: np.array(rates) / np.array(found["iCT"]) for name, rates in found.items()}
    denoiser = float(np.median(ratios["denoiser, Heun"]))
    result = {}
    for name, ratio in ratios.items():
        over, share = float(np.median(ratio)), objectives.pretrain_share(configured(data, OBJECTIVES[name], 100, 0))
        run = 1 / (share / denoiser + (1 - share) / over)
        result[name] = {
            "images_per_second": ict * over,
            "over_ict": over,
            "over_ict_range": [float(ratio.min()), float(ratio.max())],
            "run_over_ict": run,
            "run_images_per_second": ict * run,
        }
    return result


def _steps(data: Data, overrides: list[str], ranks: Any) -> Iterator[int]:
    """Each `next` takes a training step in the middle of a run, and returns its number of images."""
    config = configured(data, overrides, 10_000, 0)
    images = ImageDataset(load_dataset(config.data))
    epochs = 60
    visit = objectives.build(config, schedule.build(config.schedule), epochs, images.shape)
    engine = engines.build(networks.for_run(config, images.shape), config, ranks, 10_000)
    teacher = objectives.teacher_of(config, engine)
    emas = [EMA(engine.weights(), decay) for decay in config.train.ema]
    batch, step = config.train.batch_size, 0
    state = torch.zeros(batch, *images.shape)
    while True:
        ids = (np.arange(batch) + step * batch) % len(images)
        x0, labels = images.batch(ids)
        chosen = torch.from_numpy(labels) if config.network.classes and labels is not None else None
        with engine.autocast():
            visits = visit.plan(ids, 40 + step % 16)
            losses, state = objectives.visit_loss(engine.module, x0, state, visits, chosen, teacher)
        engine.backward_and_step(losses.mean(), step % 10_000)
        step += 1
        for ema in emas:
            ema.update(step)
        yield batch


def planned(suite: str, seeds: list[int], only: list[str] | None) -> Iterator[tuple[str, list[str], str, int, str]]:
    """(key, overrides, objective for its speed, seed, budget) of every run of a suite, the most informative first."""
    if suite == "ablations":
        if not only:
            yield "chain L=2, tuned | ve | ablation", TUNED, "", 0, "ablation"
        for setting, values in ABLATIONS.items():
            for value, sets in values.items():
                if not only or setting in only:
                    base = [] if setting in ("iCT", "ECT", "ten times the images") else TUNED
                    yield f"{setting} = {value} | ve | ablation", [*base, *sets], "", 0, "ablation"
        if not only or "coefficients" in only:
            vp = [*TUNED, *SCHEDULES["vp"]]
            yield "coefficients = EDM's, VP | vp | ablation", vp, "", 0, "ablation"
            paper = [*vp, "schedule.preconditioning=paper"]
            yield "coefficients = paper's, VP | vp | ablation", paper, "", 0, "ablation"
        return
    for seed in seeds:
        for kind, schedule_sets in SCHEDULES.items():
            for name, sets in OBJECTIVES.items():
                if (only and name not in only) or (seed > 0 and name not in COMPARED):
                    continue
                yield f"{name} | {kind} | time | {seed}", [*schedule_sets, *sets], name, seed, "time"
    for kind, schedule_sets in SCHEDULES.items():
        for name in COMPARED[:3]:
            if not only or name in only:
                yield f"{name} | {kind} | images | 0", [*schedule_sets, *OBJECTIVES[name]], name, 0, "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=["speed", "objectives", "ablations", "report"])
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", help="objectives, or ablated settings")
    parser.add_argument("--schedules", nargs="*", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument(
        "--images", type=int, help="images that iCT trains on; the other objectives train for the same time"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/quality-<data>.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="where the runs are kept")
    arguments = parser.parse_args()
    data = DATA[arguments.data]
    path: Path = arguments.json or ROOT / "benchmarks" / "results" / f"quality-{arguments.data}.json"
    book = json.loads(path.read_text()) if path.exists() else {"rows": {}}

    def keep() -> None:
        book.update(about(), data=arguments.data)  # those of the latest command that updated the file
        write_json(path, {}, book)

    if arguments.suite == "report":
        from study_report import report

        report(book, arguments.runs / arguments.data, path.parent)
        return
    known = {} if arguments.suite == "speed" else book.get("speed", {})
    if missing := [name for name in OBJECTIVES if name not in known]:
        ict = known["iCT"]["images_per_second"] if known else None
        measured = speeds(data, missing, arguments.rounds, ict) | known
        book["speed"] = {name: measured[name] for name in OBJECTIVES}
        keep()
        for name, row in book["speed"].items():
            low, high = row["over_ict_range"]
            rate, ratio = row["images_per_second"], row["over_ict"]
            print(f"{name:30} {rate:6.0f} images/s, {ratio:.2f} x iCT ({low:.2f} to {high:.2f})")
    if arguments.suite == "speed":
        return
    for key, sets, name, seed, budget in planned(arguments.suite, arguments.seeds, arguments.only):
        if key in book["rows"] or key.split(" | ")[1] not in arguments.schedules:
            continue
        images = arguments.images or (data.ablated if budget == "ablation" else data.images)
        share = book["speed"][name]["run_over_ict"] if budget == "time" else 1.0
        directory = arguments.runs / arguments.data / "".join(c if c.isalnum() else "-" for c in key)
        row = run(data, sets, round(images * share), seed, directory)
        book = json.loads(path.read_text()) if path.exists() else book  # another process may have added rows
        book["rows"][key] = row
        keep()
        minutes = f"{row['images'] / book['speed'][name]['run_images_per_second'] / 60:.1f} min" if name else ""
        fds = "  ".join(f"{n}: {s['fd']:.1f}" for n, s in row["evaluations"].items())
        collapsed = "  COLLAPSED" if any(s["collapsed"] for s in row["evaluations"].values()) else ""
        print(f"{key:55} {row['steps']:6} steps {minutes:8}  fd {fds}{collapsed}", flush=True)


if __name__ == "__main__":
    main()
