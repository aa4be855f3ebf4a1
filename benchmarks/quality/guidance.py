"""Guidance trained in (`objective.guidance`, one call per evaluation) beside guidance at sampling (two calls).

    python benchmarks/quality/guidance.py train --directory build/guidance
    python benchmarks/quality/guidance.py report --directory build/guidance --json FILE.json --plot FILE.png

`train` trains one model with label dropout and one with guidance of --weight, on the same number of images, with the
same seed and settings. A second call resumes runs that are not complete. `report` samples them: the first at weight 1
and, with two calls, at 1.5 and at --weight; the second with one call. fd, precision and recall are in the features of
the yardstick's classifier (benchmarks/yardstick), against all images of the data set. The share is that of the images
which the same classifier assigns to the class that was asked for. Milliseconds per image are CPU time of one thread,
medians of rounds in which the kinds of sampling alternate. The picture has one column per class, with one evaluation
per image; the rows are in the order of the table, --rows of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import udddm
from udddm.config import RunConfig, load_config
from udddm.data import ImageDataset, MapDataset, load_dataset
from udddm.evaluation import evaluate
from udddm.evaluation.features import FeatureNetwork, extract, load_features
from udddm.evaluation.metrics import Reference
from udddm.image_grid import save_image_grid

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "yardstick"))
from report import about, heading, write_report

CLASSES = 10


@dataclass(frozen=True)
class Data:
    settings: tuple[str, ...]
    features: str
    samples: int
    """The number of images, from the first on, that are trained on."""
    steps: int
    count: int
    """The number of images that are scored."""


DATA = {
    "digits": Data(("objective={name: ict, pretrain: 0.2}",), "features:digits", 1797, 1000, 1000),
    "fashion-mnist": Data(
        ("objective={name: ect, pretrain: 0.3}", "network.patch=4", "network.channel_mult=[1]"),
        "features:fashion_mnist",
        12_000,
        1600,
        1000,
    ),
}


class First:
    """The first `count` images of a data set."""

    def __init__(self, dataset: MapDataset, count: int):
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Any:
        return self._dataset[index]


def configured(name: str, weight: float, seed: int, steps: int | None) -> RunConfig:
    fixed = [
        f"seed={seed}",
        f"train.steps={steps or DATA[name].steps}",
        "train.epochs=null",
        "train.torch_threads=1",
        f"network.classes={CLASSES}",
        "network.label_dropout=0.2",
        "store.kind=gpu",
        "checkpoint={every_steps: 200, keep: 20}",
        "sample.every_steps=0",
        "sample.final=0",
        "loggers=[]",
    ]
    return load_config(name, [*fixed, *DATA[name].settings, f"objective.guidance={weight:g}"])


def directory(base: Path, name: str, weight: float, seed: int) -> Path:
    return base / f"{name}-{weight:g}-{seed}"


def weights_of(base: Path, name: str, weight: float, seed: int, step: int | None) -> Path:
    """The run, or its checkpoint of a step."""
    run = directory(base, name, weight, seed)
    return run if step is None else run / "checkpoints" / f"step-{step:08d}"


def score(images: torch.Tensor, labels: list[int], network: FeatureNetwork, real: Reference) -> dict[str, float]:
    features, logits = extract(network, torch.split(images, 250))
    found = evaluate.score(features, logits, real, network.name)
    share = float((np.asarray(logits).argmax(1) == np.array(labels)).mean())
    return {"fd": found["fd"], "precision": found["precision"], "recall": found["recall"], "share": share}


def milliseconds(models: dict[str, Any], sets: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[float]]:
    """The CPU time per image of each kind of sampling, in every round."""
    found: dict[str, list[float]] = {kind: [] for kind in sets}
    for number in range(rounds + 1):
        for kind, given in sets.items():
            began = time.process_time()
            models[kind].sample(range(100), labels=[seed % CLASSES for seed in range(100)], batch=100, **given)
            if number:  # the first round warms up
                found[kind].append((time.process_time() - began) * 1000 / 100)
    return found


def report(given: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """The scores of every seed and the times, for each kind of sampling and number of evaluations; and some images."""
    name, weight, data = given.data, given.weight, DATA[given.data]
    network = load_features(data.features, torch.device("cpu"))
    real = evaluate.reference(ImageDataset(load_dataset(load_config(name).data)), network)
    labels = [seed % CLASSES for seed in range(data.count)]
    trained_with = {"plain": (1.0, 1.0), "two calls, 1.5": (1.0, 1.5), f"two calls, {weight:g}": (1.0, weight)}
    trained_with |= {f"trained in, {weight:g}": (weight, 1.0)}
    kinds = {f"{kind}|{steps}": (*pair, steps) for steps in (1, 2) for kind, pair in trained_with.items()}
    table: dict[str, Any] = {kind: {"seeds": {}} for kind in kinds}
    shown = []
    for seed in given.seeds:
        places = {w: weights_of(given.directory, name, w, seed, given.step) for w in (1.0, weight)}
        trained = {w: udddm.load_model(place, device="cpu") for w, place in places.items()}
        for kind, (own, guidance, steps) in kinds.items():
            drawn = trained[own].sample(range(data.count), labels=labels, steps=steps, guidance=guidance)
            images = torch.from_numpy(np.asarray(drawn))
            table[kind]["seeds"][str(seed)] = score(images, labels, network, real)
            if seed == given.seeds[0] and steps == 1:
                shown.append(images[: given.rows * CLASSES])
    models = {kind: trained[own] for kind, (own, _, _) in kinds.items()}
    sets = {kind: {"steps": steps, "guidance": guidance} for kind, (_, guidance, steps) in kinds.items()}
    for kind, times in milliseconds(models, sets, given.rounds).items():
        table[kind]["milliseconds"] = times
    length = trained[1.0].config.train.steps or 0
    seen = (given.step or length) * trained[1.0].config.train.batch_size
    return {"data": name, "weight": weight, "images": seen, "steps": length, "table": table}, torch.cat(shown)


def lines(found: dict[str, Any]) -> list[str]:
    made = [f"{found['data']}: after {found['images']:,} images of runs of {found['steps']:,} steps"]
    made += [f"{'evaluations':12}{'guidance':18}{'fd':>14}{'precision':>11}{'recall':>8}{'share':>8}{'ms/image':>10}"]
    for kind, row in found["table"].items():
        guidance, _, steps = kind.partition("|")
        values = {key: [each[key] for each in row["seeds"].values()] for key in ("fd", "precision", "recall", "share")}
        mean = {key: statistics.fmean(each) for key, each in values.items()}
        fd = f"{mean['fd']:.1f}"
        if len(values["fd"]) > 1:
            fd += f" ± {statistics.stdev(values['fd']):.1f}"
        made.append(
            f"{steps:12}{guidance:18}{fd:>14}{mean['precision']:>11.3f}{mean['recall']:>8.3f}{mean['share']:>8.3f}"
            f"{statistics.median(row['milliseconds']):>10.2f}"
        )
    return made


def train(given: argparse.Namespace) -> None:
    for seed in given.seeds:
        for weight in (1.0, given.weight):
            config = configured(given.data, weight, seed, given.steps)
            images = First(load_dataset(config.data), DATA[given.data].samples)
            udddm.train(config, images, run_dir=directory(given.directory, given.data, weight, seed), device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["train", "report"])
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--directory", type=Path, required=True, help="for the runs")
    parser.add_argument("--weight", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10])
    parser.add_argument("--steps", type=int, help="default: 1000 for the digits, 1600 for Fashion-MNIST")
    parser.add_argument("--step", type=int, help="report the checkpoints of this step, not the end of the runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--json", type=Path, help="the table; the same as text is written next to it")
    parser.add_argument("--plot", type=Path, help="PNG of the images")
    given = parser.parse_args()
    if given.suite == "train":
        train(given)
        return
    found, shown = report(given)
    text = [heading(head := about()), *lines(found)]
    print("\n".join(text))
    write_report(given.json, head, found, text)
    if given.plot:
        save_image_grid(shown, given.plot, columns=CLASSES)


if __name__ == "__main__":
    main()
