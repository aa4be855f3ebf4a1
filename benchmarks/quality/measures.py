"""Scores of udddm-evaluate, the yardstick and torchmetrics on the same samples and features.

    python benchmarks/quality/measures.py --json benchmarks/results/measures.json

The samples are images of the data sets with added noise: 1,000 digits, and 2,000 images of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from udddm.cli.evaluate import main as udddm_evaluate
from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.evaluation.features import load_features

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, write_json

YARDSTICK = Path(__file__).parents[1] / "yardstick"
sys.path.insert(0, str(YARDSTICK))
COUNTS = {"digits": 1000, "fashion-mnist": 2000}


def torchmetrics_fid(real: torch.Tensor, fake: torch.Tensor, features: str) -> float:
    """The Frechet distance of torchmetrics, with our feature network."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Wrapped(torch.nn.Module):
        num_features = 64

        def __init__(self) -> None:
            super().__init__()
            self.network = load_features(features, torch.device("cpu"))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.network(images.float())[0])

    metric = FrechetInceptionDistance(feature=Wrapped()).set_dtype(torch.float64)
    for images, is_real in ((real, True), (fake, False)):
        for batch in torch.split(images, 500):
            metric.update(batch, real=is_real)
    return float(metric.compute())


def compare(name: str, directory: Path) -> dict[str, Any]:
    dataset = ImageDataset(load_dataset(DataConfig(name=name)))
    real, _ = dataset.batch(np.arange(len(dataset)))
    noise = torch.randn(COUNTS[name], *dataset.shape, generator=torch.Generator().manual_seed(0))
    samples = (real[: COUNTS[name]] + 0.3 * noise).clamp(-1, 1)
    path, out = directory / f"{name}.npy", directory / f"{name}.json"
    np.save(path, samples.numpy())
    features = f"features:{name.replace('-', '_')}"
    arguments = ["--samples", str(path), "--set", f"data.name={name}", "--features", features, "--json", str(out)]
    if udddm_evaluate([*arguments, "--cache", str(directory), "--device", "cpu"]) != 0:
        raise SystemExit("udddm-evaluate failed")
    command = [sys.executable, str(YARDSTICK / "yardstick.py"), name, str(path)]
    yardstick = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ours = json.loads(out.read_text())
    return {
        "udddm-evaluate": {key: ours[key] for key in ("fd", "precision", "recall")},
        "yardstick": {key: yardstick[key] for key in ("fd", "precision", "recall")},
        "torchmetrics fid": torchmetrics_fid(real, samples, features),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Metric `Frechet")
    with tempfile.TemporaryDirectory() as directory:
        found = {name: compare(name, Path(directory)) for name in COUNTS}
    for name, row in found.items():
        ours, theirs = row["udddm-evaluate"], row["yardstick"]
        figures = ", ".join(f"{key} {ours[key]:.4f} and {theirs[key]:.4f}" for key in ours)
        print(f"{name}: udddm-evaluate and yardstick: {figures}; torchmetrics' FID {row['torchmetrics fid']:.4f}")
    if arguments.json:
        write_json(arguments.json, about("torchmetrics"), {"found": found})


if __name__ == "__main__":
    main()
