"""The same images as every kind of data set: fingerprints of a short run, and images/s in random order.

    python benchmarks/training/data_kinds.py --json benchmarks/results/data-kinds.json

First, 200 images are written as a folder, ZIP archives, WebDataset shards, Hugging Face data sets, .npz and Zarr, and a
short run is trained on each: weights, EMA and state must be equal. Then images with detail at several scales, as PNG
files or in arrays, are read in random batches by one thread, in rounds that alternate between the kinds; ratios are
medians over rounds, with the range of the middle half. It needs webdataset and datasets (the extra `test`).
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

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

Images = np.ndarray[Any, Any]
TREE: dict[str, Any] = {
    "network": {
        "base_channels": 8,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "classes": 4,
    },
    "objective": {"name": "ict", "refined": {"share": 0.5}},
    "train": {"steps": 40, "batch_size": 40},
    "checkpoint": {"every_steps": 40},
    "sample": {"every_steps": 0, "final": 0},
    "store": {"kind": "gpu"},
}


def picture_like(count: int, side: int) -> Images:
    """Images uint8 [N, 3, side, side] with detail at several scales, which compress about as photographs do."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found = np.empty((count, 3, side, side), np.uint8)
    for index in range(count):
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 255, (part, part, 3), np.uint8)).resize((side, side)), "f4")
            for part in (2, 10, side // 2)
        ]
        pixels = sum(weight * layer for weight, layer in zip((0.5, 0.3, 0.2), layers, strict=True))
        found[index] = np.asarray(pixels, np.uint8).transpose(2, 0, 1)
    return found


def open_all(place: Path, pixels: Images, labels: Images) -> dict[str, tuple[str, str]]:
    """Write the images as every kind. Returns name and path of each."""
    from udddm.testing import image_sets

    found = {}
    for kind, (name, write) in image_sets.LOCAL.items():
        folder = place / kind.replace(" ", "-")
        folder.mkdir(parents=True)
        options = {"each": 1000} if kind == "webdataset" else {}
        found[kind] = name, write(str(folder), pixels, labels, **options)
    return found


def run_fingerprints(place: Path, count: int) -> dict[str, list[str | None]]:
    """The fingerprints of weights, EMA and state of a run on each kind."""
    import udddm

    pixels = np.random.default_rng(1).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    found: dict[str, list[str | None]] = {}
    for kind, (name, path) in open_all(place / "data", pixels, np.arange(count) % 4).items():
        tree = {**TREE, "data": {"name": name, "path": path}}
        result = udddm.train(tree, run_dir=place / "runs" / kind.replace(" ", "-"), device="cpu")
        found[kind] = [result.weights_sha256, result.ema_sha256, result.state_sha256]
    return found


def rates(place: Path, count: int, side: int, rounds: int, batch: int) -> dict[str, list[float]]:
    """Images/s of each kind, by round."""
    from udddm.config import DataConfig
    from udddm.data import ImageDataset, load_dataset

    kinds = open_all(place, picture_like(count, side), np.arange(count) % 4)
    opened = {
        kind: ImageDataset(load_dataset(DataConfig(name=name, path=path))) for kind, (name, path) in kinds.items()
    }
    ids = np.random.default_rng(2).permutation(count)
    first = opened["npz"].batch(ids[:batch])[0]
    found: dict[str, list[float]] = {kind: [] for kind in opened}
    for number in range(rounds + 1):
        for kind, images in opened.items():
            assert bool((images.batch(ids[:batch])[0] == first).all()), kind
            began = time.perf_counter()
            for start in range(0, count, batch):
                images.batch(ids[start : start + batch])
            if number:  # the first round fills the caches of the operating system
                found[kind].append(count / (time.perf_counter() - began))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="images whose reading is measured")
    parser.add_argument("--size", type=int, default=64, help="their side in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    head = about("pillow", "zarr", "webdataset", "datasets")
    lines = [heading(head)]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
        prints = run_fingerprints(place / "run", 200)
        equal = all(each == prints["npz"] for each in prints.values())
        lines.append(
            f"runs of 40 steps on the same 200 images as {', '.join(prints)}: weights, EMA and state are "
            + ("equal" if equal else "NOT equal")
        )
        print(lines[-1], flush=True)
        measured = rates(place / "speed", arguments.images, arguments.size, arguments.rounds, arguments.batch)
    lines += ["", f"{'kind':14}{'images/s':>10}{'over zarr':>11}   middle half"]
    rows = []
    for kind, found in measured.items():
        ratios = [own / zarr for own, zarr in zip(found, measured["zarr"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"{kind:14}{statistics.median(found):10.0f}{middle:11.2f}   {low:.2f} to {high:.2f}")
        rows.append({"kind": kind, "images_per_second": found, "over_zarr": middle, "half": [low, high]})
    print("\n".join(lines[2:]))
    write_report(arguments.json, head, {"fingerprints": prints, "equal": equal, "rows": rows}, lines)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
