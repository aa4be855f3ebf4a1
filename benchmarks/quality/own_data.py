"""`udddm train FOLDER` on seven kinds of data: what it chooses, how long it takes, the samples, and their score.

    python benchmarks/quality/own_data.py --directory build/own-data --fraction 0.1 --json own-data.json

The data are made of what is at hand: the digits as PNG files in folders of classes, Fashion-MNIST as an .npz file and
2,000 of its images as gray PNG files, and crops of the two photographs that come with scikit-learn. `--fraction`
shortens the runs, except those of the digits, of which the preset is trained too: the score of the files is compared
with the preset's. `--json` keeps the rows of other data sets that an earlier call wrote there. Scores are Frechet
distances: for the digits and Fashion-MNIST in the features of the yardstick's classifiers, for others in their pixels,
whitened by nothing, so that they compare only with one another. Each run has a grid of samples in its directory, to be
looked at; `--picture` draws the first rows of all of them. `--device cuda` trains what is chosen for a CPU on a GPU, in
less time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import udddm
from udddm.config import load_config
from udddm.config.reading import overridden, resolve
from udddm.data import ImageDataset, load_dataset
from udddm.image_grid import encode, to_uint8
from udddm.tools import automatic

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "yardstick"))
from report import about, device_name, heading, write_json

Pixels = npt.NDArray[np.uint8]


def pixels(images: torch.Tensor) -> torch.Tensor:
    """The features of data that have no classifier: at most 16x16 means of pixels for each channel."""
    side = min(16, *images.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(images, side).flatten(1)


def built_in(name: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """The images [N, H, W, C] and labels of a data set that the package loads."""
    data = ImageDataset(load_dataset(load_config(name).data))
    images, labels = data.batch(np.arange(len(data)))
    assert labels is not None
    return to_uint8(images), np.asarray(labels, np.int64)


def crops(count: int, height: int, width: int) -> Pixels:
    """Crops of scikit-learn's photographs at half their size, [N, H, W, 3]."""
    from sklearn.datasets import load_sample_images

    photographs = [np.asarray(photo)[::2, ::2] for photo in load_sample_images().images]
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        photo = photographs[number % len(photographs)]
        y, x = random.integers(0, photo.shape[0] - height + 1), random.integers(0, photo.shape[1] - width + 1)
        found.append(photo[y : y + height, x : x + width])
    return np.stack(found)


def as_files(place: Path, images: Pixels, labels: npt.NDArray[np.int64] | None = None) -> Path:
    for number, image in enumerate(images):
        folder = place if labels is None else place / str(labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.png").write_bytes(encode(image))
    return place


def as_array(place: Path, **arrays: npt.NDArray[Any]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    np.savez(place.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    return place.with_suffix(".npz")


def fashion(place: Path) -> Path:
    images, labels = built_in("fashion-mnist")
    return as_array(place, images=images, labels=labels)


def four_channels(place: Path) -> Path:
    """Gray crops of 32x32, of which four neighbors are the channels of an image of 16x16, like latents."""
    gray = crops(2000, 32, 32).mean(3).astype(np.uint8)
    return as_array(place, images=np.stack([gray[:, y::2, x::2] for y in (0, 1) for x in (0, 1)], 1))


DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "digits": (lambda p: as_files(p, *built_in("digits")), "features:digits"),
    "fashion-mnist": (fashion, "features:fashion_mnist"),
    "color-32x32": (lambda p: as_files(p, crops(500, 32, 32)), "own_data:pixels"),
    "color-48x48": (lambda p: as_files(p, crops(2000, 48, 48)), "own_data:pixels"),
    "color-28x36": (lambda p: as_files(p, crops(2000, 28, 36)), "own_data:pixels"),
    "gray-28x28": (lambda p: as_files(p, built_in("fashion-mnist")[0][:2000]), "features:fashion_mnist"),
    "four-channels": (four_channels, "own_data:pixels"),
}


def train(directory: Path, config: udddm.RunConfig, features: str, device: str) -> dict[str, Any]:
    """Train a run, and score it with 1 and 2 evaluations."""
    began = time.perf_counter()
    udddm.train(config, run_dir=directory, device=device)
    minutes = (time.perf_counter() - began) / 60
    data, model = load_dataset(config.data), udddm.load_model(directory, device="cpu")
    count = min(2000, len(data))
    found: dict[str, Any] = {"minutes": minutes, "steps": config.train.steps}
    for evaluations in (1, 2):
        images = model.sample(range(count), steps=evaluations)
        found[f"fd{evaluations}"] = udddm.evaluate(
            images, data, features=features, metrics=["frechet"], device="cpu"
        ).fd
    return found


def measure(name: str, directory: Path, fraction: float, device: str) -> dict[str, Any]:
    make, features = DATA[name]
    place = make(directory / "data" / name)
    config, lines = automatic.choose(automatic.data_section(str(place)), automatic.Machine(False))
    steps = round((config.train.steps or 0) * (1.0 if name == "digits" else fraction))
    changes = [f"train.steps={steps}", "loggers=[]"]
    chosen = resolve(overridden(config.model_dump(mode="json"), changes, name), name)
    found = {
        "data": name,
        "chosen": lines,
        "whole_steps": config.train.steps,
        "fraction": 1.0 if name == "digits" else fraction,
        **train(directory / name, chosen, features, device),
    }
    if name == "digits":
        preset = load_config("digits", ["loggers=[]"])
        found["preset"] = train(directory / "digits-preset", preset, features, device)
    return found


def picture(directory: Path, path: Path, rows: int = 2) -> None:
    """Draw the first rows of the grid of each run in `directory`, one below the other."""
    from matplotlib.figure import Figure
    from PIL import Image

    grids = {name: directory / name / "samples.png" for name in DATA}
    grids = {name: grid for name, grid in grids.items() if grid.exists()}
    figure = Figure(figsize=(6, 1.5 * len(grids)), layout="constrained")
    for axis, (name, grid) in zip(figure.subplots(len(grids), 1, squeeze=False)[:, 0], grids.items(), strict=True):
        image = Image.open(grid).convert("RGB")
        axis.imshow(image.crop((0, 0, image.width, image.height * rows // 10)), interpolation="nearest")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for data and runs, which are kept")
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="a PNG of samples of all runs in --directory")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where runs are trained")
    arguments = parser.parse_args()
    head = about("torch", device=device_name(arguments.device))
    print(heading(head))
    print(f"{'data':<16}{'steps':>8}{'of':>8}{'minutes':>9}{'fd, 1':>9}{'fd, 2':>9}")
    rows = []
    for name in arguments.only:
        shutil.rmtree(arguments.directory / "data" / name, ignore_errors=True)
        row = measure(name, arguments.directory, arguments.fraction, arguments.device)
        rows.append(row)
        for label, part in ((name, row), ("  its preset", row.get("preset"))):
            if part is not None:
                whole = part.get("whole_steps", part["steps"])
                print(
                    f"{label:<16}{part['steps']:>8}{whole:>8}{part['minutes']:>9.1f}"
                    f"{part['fd1']:>9.1f}{part['fd2']:>9.1f}",
                    flush=True,
                )
        if arguments.json:
            earlier = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
            book = {each["data"]: each for each in earlier} | {
                name: row | {key: head[key] for key in ("commit", "machine")}
            }
            write_json(arguments.json, head, {"rows": [book[each] for each in DATA if each in book]})
    print(json.dumps({row["data"]: row["chosen"] for row in rows}, indent=1))
    if arguments.picture:
        picture(arguments.directory, arguments.picture)


if __name__ == "__main__":
    main()
