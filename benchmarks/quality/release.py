"""Create a release of a finished run: a directory for udddm-sample, with samples, a grid and scores.

    python benchmarks/quality/release.py runs/fashion-mnist runs/releases/tuning

The release contains the average of the weights with the lowest Frechet distance at one evaluation; the scores of all
averages are printed. samples-1.npy contains 2,000 uint8 images from one evaluation each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import udddm
from udddm.data import load_dataset
from udddm.image_grid import save_image_grid
from udddm.runs import pretrained
from udddm.runs.checkpoint import load_step
from udddm.runs.release import write_weights

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "yardstick"))
STEPS = (1, 2, 4)


def pixels(images: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """float in [-1, 1] -> uint8."""
    found: np.ndarray[Any, np.dtype[np.uint8]] = np.rint((images + 1) * 127.5).astype(np.uint8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--features", default="features:fashion_mnist")
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    destination: Path = arguments.destination

    first = udddm.load_model(arguments.run, device="cpu")
    dataset = load_dataset(first.config.data)
    by_decay: dict[str, dict[str, dict[str, Any]]] = {}
    for decay in first.config.train.ema:
        model = udddm.load_model(arguments.run, ema=decay, device="cpu")
        scores = {}
        for steps in STEPS:
            images = udddm.sample(model, range(arguments.count), steps=steps)
            found = udddm.evaluate(images, dataset, features=arguments.features, device="cpu")
            figures = scores[str(steps)] = found.to_dict()
            print(
                f"EMA {decay:g}, {steps} evaluations: fd {figures['fd']:.2f}, recall {figures['recall']:.3f}",
                flush=True,
            )
        by_decay[f"{decay:g}"] = scores
    best = min(by_decay, key=lambda decay: by_decay[decay]["1"]["fd"])

    destination.mkdir(parents=True, exist_ok=True)
    write_weights(udddm.load_model(arguments.run, ema=best, device="cpu"), best, destination)
    with pretrained.checkpoint_files(arguments.run) as checkpoint:
        position = load_step(checkpoint)
    model = udddm.load_model(destination, device="cpu")
    images = udddm.sample(model, range(arguments.count))
    np.save(destination / "samples-1.npy", pixels(images))
    save_image_grid(torch.from_numpy(images[:100]), destination / "grid.png")
    save_image_grid(torch.from_numpy(udddm.sample(model, range(100), steps=2)), destination / "grid-2.png")
    metrics = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    report = {
        "steps": position,
        "images": position * first.config.train.batch_size,
        "images_per_second": float(np.median([line["images_per_second"] for line in metrics])),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "ema": best,
        "scores": by_decay,
    }
    write_json(destination / "scores.json", about(), report)
    print(f"{destination}: EMA {best}, fd {by_decay[best]['1']['fd']:.2f} at one evaluation")


if __name__ == "__main__":
    main()
