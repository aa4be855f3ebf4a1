"""Zero-shot editing, and inpainting and colorization that are trained, on Fashion-MNIST: pictures and figures.

    python benchmarks/quality/edits.py --directory build/edits --json edits.json --plot edits.png

Zero-shot: the model in benchmarks/results/fashion-mnist/consistency, which was trained on all 60,000 images, enlarges
block means of 7x7 pixels, and draws images from paintings, which are these block means, blurred. Trained through the
conditioning image (`data.condition`) for `--steps` steps of 32 images on all but the first 2,000 images: inpainting,
scored at the hidden central 14x14 pixels, and colorization of images that are tinted by their class, trained without
classes, so that the color must be told from the shape. Each has a baseline that needs no network. PSNR is the mean over
images, for values from black to white, which are 2 apart; the share is that of images to which the yardstick's
classifier gives the class of the original. One seed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks import FACTOR, HELD_OUT, RELEASE, conditional, options, psnr, split
from torch.nn import functional

import udddm
from udddm.data import ArrayImages
from udddm.diffusion.editing import Stroke, Upscale
from udddm.evaluation.features import load_features
from udddm.image_grid import save_image_grid, to_uint8

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "yardstick"))
from report import about, heading, write_json

EDITED, SHOWN = 200, 10
HIDDEN = (slice(None), slice(None), slice(7, 21), slice(7, 21))
COLORS = torch.tensor(
    [[9, 2, 2], [2, 9, 2], [2, 3, 9], [9, 9, 2], [9, 2, 9], [2, 9, 9], [9, 5, 1], [6, 3, 9], [9, 9, 9], [4, 6, 2]]
)
"""The tint of each class, of 9."""


def share(images: torch.Tensor, labels: list[int]) -> float:
    """The share of `images` [B, 1, 28, 28] that the yardstick's classifier assigns to their `labels`."""
    logits = load_features("features:fashion_mnist", torch.device("cpu"))(images)[1]
    assert logits is not None
    return float((logits.argmax(1) == torch.tensor(labels)).double().mean())


def zero_shot(real: torch.Tensor, labels: list[int]) -> dict[str, Any]:
    """Enlarge, draw from paintings, and interpolate with the released model. Returns figures, and images as "shown"."""
    model = udddm.load_model(RELEASE, device="cpu")
    small = functional.avg_pool2d(real, FACTOR)
    seeds = range(len(real))
    larger = torch.from_numpy(model.edit(small, seeds, Upscale(FACTOR), labels=labels))
    bicubic = functional.interpolate(small, scale_factor=FACTOR, mode="bicubic").clamp(-1, 1)
    painting = functional.interpolate(small, scale_factor=FACTOR, mode="bilinear")
    drawn = torch.from_numpy(model.edit(painting, seeds, Stroke(sigma=1.0), labels=labels))
    between = torch.from_numpy(model.interpolate((3, 13), SHOWN, labels=[9] * SHOWN))
    ends = torch.from_numpy(model.sample([3, 13], labels=[9, 9]))
    return {
        "upscale": {
            "psnr": psnr(larger, real),
            "psnr_bicubic": psnr(bicubic, real),
            "largest_difference_of_block_means": float((functional.avg_pool2d(larger, FACTOR) - small).abs().max()),
        },
        "stroke": {"share": share(drawn, labels), "share_painting": share(painting, labels)},
        "interpolate": {"largest_difference_of_ends": float((between[[0, -1]] - ends).abs().max())},
        "shown": [each[:SHOWN] for each in (bicubic, larger, painting, drawn, between)],
    }


def inpaint(train: ArrayImages, real: torch.Tensor, labels: list[int], run: Path, steps: int) -> dict[str, Any]:
    """Train inpainting, and fill the centers of held-out images. The baseline is the mean training image."""
    model, _ = conditional(train, "{kind: mask}", run, steps, 1)
    given = real.clone()
    given[HIDDEN] = torch.nan
    filled = torch.from_numpy(model.sample(range(len(real)), conditions=given, labels=labels))
    pixels = torch.stack([torch.as_tensor(train[i][0]).float() for i in range(0, len(train), 29)])
    mean = (pixels.mean(0) / 127.5 - 1).expand_as(real)
    return {
        "psnr_of_the_hidden_part": psnr(filled[HIDDEN], real[HIDDEN]),
        "psnr_of_the_mean_image": psnr(mean[HIDDEN], real[HIDDEN]),
        "shown": [each[:SHOWN].expand(-1, 3, -1, -1) for each in (given.nan_to_num(0.0), filled, real)],
    }


def tinted(images: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """RGB images [B, 3, 28, 28] in [-1, 1] of gray ones, each tinted by its class."""
    colors = COLORS[torch.tensor(labels)].float()[:, :, None, None] / 9
    return (images + 1) * colors - 1


def colorize(train: ArrayImages, real: torch.Tensor, labels: list[int], run: Path, steps: int) -> dict[str, Any]:
    """Train colorization without classes, and color held-out images. The baseline leaves them gray."""
    samples = [train[i] for i in range(len(train))]
    gray = torch.stack([torch.as_tensor(sample[0]) for sample in samples]).float() / 127.5 - 1
    rgb = to_uint8(tinted(gray, [int(sample[1]) for sample in samples])).transpose(0, 3, 1, 2)
    images = ArrayImages(np.ascontiguousarray(rgb))
    model, _ = conditional(images, "{kind: gray}", run, steps, 1, "network.classes=0", "network.label_dropout=0")
    color = tinted(real, labels)
    given = (color * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    colored = torch.from_numpy(model.sample(range(len(real)), conditions=given))
    return {
        "rms_error": float((colored - color).square().mean().sqrt()),
        "rms_error_of_gray": float((given - color).square().mean().sqrt()),
        "shown": [each[:SHOWN] for each in (given.expand_as(color), colored, color)],
    }


def main() -> None:
    arguments = options(__doc__).parse_args()
    head = about("torch")
    print(heading(head))
    train, real, labels = split()
    steps = arguments.steps
    found = {
        "zero_shot": zero_shot(real[:EDITED], labels[:EDITED]),
        "inpaint": inpaint(train, real, labels, arguments.directory / f"inpaint-{steps}", steps),
        "colorize": colorize(train, real, labels, arguments.directory / f"colorize-{steps}", steps),
    }
    rows = torch.cat([images.expand(-1, 3, -1, -1) for part in found.values() for images in part.pop("shown")])
    if arguments.plot:
        save_image_grid(rows, arguments.plot, columns=SHOWN, side=56)
    print(f"zero-shot: {EDITED} images; trained: {steps} steps, {HELD_OUT} held-out images")
    for name, part in found.items():
        print(name)
        for key, value in part.items():
            print(f"  {key}: {value}")
    if arguments.json:
        write_json(arguments.json, head, {"steps": steps} | found)


if __name__ == "__main__":
    main()
