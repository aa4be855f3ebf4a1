"""Super-resolution trained through the conditioning image, and zero-shot inpainting, on Fashion-MNIST.

    python benchmarks/quality/tasks.py --directory build/tasks --seeds 1 2 3 --json tasks.json --plot tasks.png

Trains the preset with `data.condition` (7x7 to 28x28, a factor of 4) on all but the first 2,000 of the images, and
enlarges the small versions of these 2,000 with one and two evaluations, once per seed. Objective and noise levels were
chosen with seed 0, on the last 2,000 images. The highest noise level is 10 instead of 50, because the condition shows
what higher ones would decide. ECT begins with a denoiser for 30 % of the epochs, rounded up: runs of
less than one epoch (1,812 steps) train only the denoiser, whose one evaluation is a mean of the possible images.

PSNR is the mean over images, for values from black to white. Bicubic interpolation of the same small images is the
baseline, and so are their pixels as blocks. fd is the Frechet distance in the features of the yardstick's classifier to
the training images; that of the real held-out images is the least that can be expected. Inpainting edits held-out
images with the model in benchmarks/results/fashion-mnist/consistency, which was trained on all 60,000 images: its
figure is only about the pixels that are known, how many of them differ from the input in 8 bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import udddm
from udddm.config import load_config
from udddm.data import ArrayImages, ImageDataset, load_dataset
from udddm.diffusion.editing import Inpaint
from udddm.image_grid import save_image_grid, to_uint8

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "yardstick"))
from report import ROOT, about, heading, write_json

HELD_OUT, FACTOR, SHOWN = 2000, 4, 10
RELEASE = ROOT / "benchmarks/results/fashion-mnist/consistency"


def split() -> tuple[ArrayImages, torch.Tensor, list[int]]:
    """The images that are trained on, and the held-out ones [HELD_OUT, 1, 28, 28] in [-1, 1] with their labels."""
    images = ImageDataset(load_dataset(load_config("fashion-mnist").data))
    pixels, labels = images.batch(np.arange(len(images)))
    assert labels is not None
    train = ArrayImages(to_uint8(pixels[HELD_OUT:]).transpose(0, 3, 1, 2), labels[HELD_OUT:], classes=10)
    return train, pixels[:HELD_OUT], labels[:HELD_OUT].tolist()


def psnr(images: torch.Tensor, real: torch.Tensor) -> float:
    """The mean peak signal-to-noise ratio in dB, for a range of 2."""
    error = (images - real).square().flatten(1).mean(1)
    return float((10 * (4 / error).log10()).mean())


def conditional(
    train: ArrayImages, condition: str, run: Path, steps: int, seed: int, *changes: str
) -> tuple[udddm.Model, float]:
    """A model that is trained on `train` with `data.condition`, and the minutes that this took."""
    settings = [
        f"seed={seed}",
        "train.torch_threads=1",
        "data.name=array",
        f"data.condition={condition}",
        "network.condition=channels",
        "objective={name: ect, edm: {p_mean: 0.0, p_std: 1.5}}",
        "schedule.sigma_max=10",
        f"train.steps={steps}",
        "train.epochs=null",
        "train.batch_size=32",
        "sample.every_steps=0",
        "sample.final=0",
        "loggers=[]",
        *changes,
    ]
    began = time.perf_counter()
    udddm.train(load_config("fashion-mnist", settings), train, run_dir=run, device="cpu")
    return udddm.load_model(run, device="cpu"), (time.perf_counter() - began) / 60


def enlarge(
    train: ArrayImages, real: torch.Tensor, labels: list[int], run: Path, steps: int, seed: int
) -> dict[str, Any]:
    """Train on `train`, and enlarge the small versions of `real`. Returns scores, with the images under "shown"."""
    model, minutes = conditional(train, f"{{kind: downscale, factor: {FACTOR}}}", run, steps, seed)
    small = functional.avg_pool2d(real, FACTOR)
    ours, twice = (
        torch.from_numpy(model.sample(range(len(real)), conditions=small, labels=labels, steps=evaluations))
        for evaluations in (1, 2)
    )
    bicubic = functional.interpolate(small, scale_factor=FACTOR, mode="bicubic").clamp(-1, 1)

    def fd(images: torch.Tensor) -> float:
        found = udddm.evaluate(images.numpy(), train, features="features:fashion_mnist", metrics=["frechet"])
        assert found.fd is not None
        return found.fd

    rows = {
        "one evaluation": ours,
        "two evaluations": twice,
        "bicubic": bicubic,
        "blocks": functional.interpolate(small, scale_factor=FACTOR),
    }
    scores: dict[str, dict[str, float | None]]
    scores = {name: {"psnr": psnr(each, real), "fd": fd(each)} for name, each in rows.items()}
    scores["real"] = {"psnr": None, "fd": fd(real)}
    shown = [rows["blocks"], bicubic, ours, twice, real]
    found = {"seed": seed, "steps": steps, "minutes": minutes, "scores": scores}
    return found | {"shown": [each[:SHOWN] for each in shown]}


def lines(runs: list[dict[str, Any]]) -> list[str]:
    """The table: mean and standard deviation over the seeds."""
    minutes = statistics.fmean(run["minutes"] for run in runs)
    found = [f"7x7 to 28x28, {runs[0]['steps']} steps in {minutes:.1f} minutes, {HELD_OUT} held-out images"]
    found.append(f"  {'':<16}{'PSNR, dB':>16}{'fd':>16}   seeds: {', '.join(str(run['seed']) for run in runs)}")
    for name in runs[0]["scores"]:
        cells = []
        for score in ("psnr", "fd"):
            values = [run["scores"][name][score] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(set(values)) > 1 else ""
            cells.append("" if values[0] is None else f"{statistics.fmean(values):.2f}{spread}")
        found.append(f"  {name:<16}{cells[0]:>16}{cells[1]:>16}")
    return found


def inpaint(real: torch.Tensor, labels: list[int]) -> dict[str, Any]:
    """Generate the central 14x14 pixels of held-out images. Returns counts, with the images under "shown"."""
    model = udddm.load_model(RELEASE, device="cpu")
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[7:21, 7:21] = True
    some, classes = real[:SHOWN], labels[:SHOWN]
    results = [
        torch.from_numpy(model.edit(some, [s + first for s in range(SHOWN)], Inpaint(mask), labels=classes))
        for first in (0, 100)
    ]
    known = ~mask.expand_as(some).numpy()
    differing = sum(int((to_uint8(each) != to_uint8(some)).transpose(0, 3, 1, 2)[known].sum()) for each in results)
    return {
        "known_pixels": int(known.sum()) * len(results),
        "known_pixels_that_differ": differing,
        "shown": [torch.where(mask, 0, some), *results, some],
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that trains models with conditioning images."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for the runs, which a second call resumes")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG of the images")
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    head = about("torch")
    print(heading(head))
    train, real, labels = split()
    runs = []
    for seed in arguments.seeds:
        place = arguments.directory / f"super-resolution-{arguments.steps}-{seed}"
        runs.append(enlarge(train, real, labels, place, arguments.steps, seed))
    filled = inpaint(real, labels)
    if arguments.plot:
        rows = torch.cat([*runs[0]["shown"], *filled["shown"]])
        save_image_grid(rows, arguments.plot, columns=SHOWN, side=56)
    print("\n".join(lines(runs)))
    differing, known = filled["known_pixels_that_differ"], filled["known_pixels"]
    print(f"inpainting: {differing} of {known} known pixels differ from the input")
    if arguments.json:
        for each in (*runs, filled):
            each.pop("shown")
        write_json(arguments.json, head, {"super_resolution": runs, "inpainting": filled})


if __name__ == "__main__":
    main()
