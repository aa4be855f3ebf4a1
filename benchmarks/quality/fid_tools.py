"""Scores of the same PNG files by udddm and by other programs, and what each convention changes.

    python benchmarks/quality/fid_tools.py --side 32 --json benchmarks/results/fid-tools-32.json
    python benchmarks/quality/fid_tools.py --side 512 --json benchmarks/results/fid-tools-512.json

Needs torch-fidelity (pip install torch-fidelity, with a torchvision that belongs to the installed torch) and scipy. The
images are drawn here: smooth color fields with noise, and a second set with less of both. Without --weights, Inception
has random weights in the published file's format, so that no download is needed: rows can be compared with each other,
and with nothing published. With --weights, the published file is used and the figures are FIDs.

    python benchmarks/quality/fid_tools.py --constants

compares torch-fidelity's features with udddm's, and prints those that the tests compare with
(tests/unit/evaluation/test_published_networks.py). With --dinov2 and a checkout of facebookresearch/dinov2, it does so
for its vision transformer too. That code is executed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

from udddm.evaluation import dinov2, metrics
from udddm.evaluation.features import FeatureNetwork, extract, load_features
from udddm.evaluation.inception import SIDE, Inception
from udddm.evaluation.weights import fill, read
from udddm.testing.features import random_dinov2, random_inception

Pixels = npt.NDArray[np.uint8]
Scores = dict[str, float]
NAMES = ("FID", "KID", "IS", "precision", "recall")
SPLITS = 4


def drawn(count: int, side: int, seed: int, strength: float) -> Pixels:
    """Smooth color fields with noise, uint8 [count, side, side, 3]."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        field = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float64)
        noisy = 128 + strength * (field - 128) + 20 * strength * generator.standard_normal(field.shape)
        found.append(noisy.clip(0, 255).round().astype(np.uint8))
    return np.stack(found)


def written(images: Pixels, directory: Path) -> Path:
    from PIL import Image

    directory.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(directory / f"{number:05}.png")
    return directory


def scores(real: tuple[Any, Any], fake: tuple[Any, Any], distance: Callable[[Any, Any], float]) -> Scores:
    """The metrics of features and logits of both sets; KID over one subset of all images."""
    precision, recall = metrics.precision_recall(real[0], fake[0])
    return {
        "FID": distance(metrics.moments(real[0]), metrics.moments(fake[0])),
        "KID": metrics.kernel_distance(real[0], fake[0], subsets=1, size=len(fake[0]))[0],
        "IS": metrics.inception_score(fake[1], SPLITS)[0],
        "precision": precision,
        "recall": recall,
    }


def torch_fidelity_scores(real: Path, fake: Path, weights: Path, count: int) -> Scores:
    """torch-fidelity's own calculation from the PNG files."""
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=str(fake),
        input2=str(real),
        cuda=False,
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        kid_subsets=1,
        kid_subset_size=count,
        isc_splits=SPLITS,
        samples_shuffle=False,
        feature_extractor="inception-v3-compat",  # otherwise, precision and recall use VGG-16
        feature_extractor_weights_path=str(weights),
        cache=False,
        verbose=False,
    )
    keys = ("frechet_inception_distance", "kernel_inception_distance_mean", "inception_score_mean", *NAMES[3:])
    return dict(zip(NAMES, (float(found[key]) for key in keys), strict=True))


def by_square_root(a: tuple[Any, Any], b: tuple[Any, Any]) -> float:
    """The Frechet distance with scipy's square root of a matrix, as in the programs of FID's authors, ADM and EDM."""
    import scipy.linalg

    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


def resized_by_pillow(images: Pixels) -> torch.Tensor:
    """Bicubic with antialiasing, each channel as float and without rounding afterwards, as clean-fid does."""
    from PIL import Image

    def one(channel: Pixels) -> npt.NDArray[np.float32]:
        image = Image.fromarray(channel.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(image).clip(0, 255)

    return torch.from_numpy(np.stack([np.stack([one(image[..., c]) for c in range(3)]) for image in images]))


def resized_by_torch(images: Pixels) -> torch.Tensor:
    """Bilinear at pixel centers without antialiasing, as pytorch-fid does."""
    found = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return torch.nn.functional.interpolate(found, (SIDE, SIDE), mode="bilinear", align_corners=False)


def features(network: FeatureNetwork, images: Pixels) -> Any:
    """Features and logits of uint8 images [N, H, W, 3], as `udddm evaluate` computes them."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return extract(network, torch.split(batch, 64))


@torch.no_grad()
def features_of_resized(module: torch.nn.Module, images: Pixels, resize: Callable[[Pixels], torch.Tensor]) -> Any:
    """The same of images that are resized first, and not rounded again."""
    parts = [module(resize(images[first : first + 16])) for first in range(0, len(images), 16)]
    return tuple(torch.cat([part[index] for part in parts]).numpy() for index in (0, 1))


def compare(arguments: argparse.Namespace, directory: Path) -> dict[str, Scores]:
    """The scores of each row of the table."""
    count, side = arguments.count, arguments.side
    real, fake = drawn(count, side, 0, 1.0), drawn(count, side, 1, 0.8)
    places = written(real, directory / "real"), written(fake, directory / "fake")
    weights = arguments.weights
    if weights is None:
        weights = directory / "inception.pth"
        given = f"{weights}#sha256={random_inception(weights)}"
    else:
        given = str(weights)
    network = load_features("inception", torch.device("cpu"), {"inception": given})
    own = features(network, real), features(network, fake)
    found = {"udddm": scores(*own, metrics.frechet)}
    found["torch-fidelity"] = torch_fidelity_scores(*places, weights, count)
    found["square root by scipy (ADM, EDM)"] = scores(*own, by_square_root)
    module = fill(Inception(), read(weights), weights)
    for name, resize in (("resized as clean-fid", resized_by_pillow), ("resized as pytorch-fid", resized_by_torch)):
        rows = [features_of_resized(module, images, resize) for images in (real, fake)]
        found[name] = scores(rows[0], rows[1], metrics.frechet)
    return found


def table(found: dict[str, Scores]) -> list[str]:
    lines = [f"{'':<34}" + "".join(f"{name:>13}" for name in NAMES) + "   FID relative to udddm"]
    for name, row in found.items():
        relative = row["FID"] / found["udddm"]["FID"] - 1
        lines.append(f"{name:<34}" + "".join(f"{row[key]:13.7g}" for key in NAMES) + f"   {relative:+.1e}")
    return lines


def pixels(count: int, *shape: int) -> torch.Tensor:
    """The images of the constants, as in the test."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


@torch.no_grad()
def constants(directory: Path, code: Path | None) -> None:
    """Print the features that the tests compare with."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    random_inception(directory / "inception.pth")
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(directory / "inception.pth"),
    )
    own = fill(Inception(), read(directory / "inception.pth"), directory / "inception.pth")
    for size in ((8, 8), (32, 32), (299, 299), (330, 400)):
        rows, logits = (values.numpy() for values in network(pixels(1, 3, *size)))
        difference = np.abs(own(pixels(1, 3, *size))[0].numpy() - rows).max()
        print(f"{size}: ({rows.mean():.7g}, {rows.std():.7g}, {rows[0, 0]:.7g}, {logits[0, 0]:.7g}),")
        print(f"    the largest difference of a feature from udddm's is {difference:g}")
    if code is None:
        return
    sys.path.insert(0, str(code))
    from dinov2.models.vision_transformer import Block, DinoVisionTransformer, MemEffAttention

    random_dinov2(directory / "dinov2.pth")
    settings = {"patch_size": 14, "img_size": 518, "embed_dim": 128, "depth": 2, "num_heads": 2, "init_values": 1.0}
    theirs = DinoVisionTransformer(**settings, block_chunks=0, block_fn=partial(Block, attn_class=MemEffAttention))
    theirs.load_state_dict(torch.load(directory / "dinov2.pth", weights_only=True))
    resized = torch.nn.functional.interpolate(
        pixels(2, 3, 32, 32).float(), (dinov2.SIDE, dinov2.SIDE), mode="bicubic", antialias=True
    )
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (dinov2.MEAN, dinov2.DEVIATION))
    rows = theirs.eval()((resized / 255 - mean) / deviation).numpy()
    print([float(f"{value:.7g}") for value in (rows.mean(), rows.std(), *rows[:, 0])])
    tensors = read(directory / "dinov2.pth")
    ours = fill(dinov2.DINOv2.of(tensors), tensors, directory / "dinov2.pth")(pixels(2, 3, 32, 32)).numpy()
    print(f"    the largest difference of a feature from udddm's is {np.abs(ours - rows).max():g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
    parser.add_argument("--count", type=int, default=32, help="images of each set; a multiple of 4")
    parser.add_argument("--weights", type=Path, help="the published weights of Inception")
    parser.add_argument("--constants", action="store_true", help="print the constants of the tests")
    parser.add_argument("--dinov2", type=Path, help="a checkout of facebookresearch/dinov2, which is executed")
    parser.add_argument("--json", type=Path, help="write the report here, and as text beside it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        if arguments.constants:
            constants(Path(directory), arguments.dinov2)
            return
        found = compare(arguments, Path(directory))
    head = about("torch-fidelity", "numpy", "scipy", "pillow")
    lines = [heading(head), *table(found)]
    print("\n".join(lines))
    write_report(arguments.json, head, {"scores": found}, lines)


if __name__ == "__main__":
    main()
