"""Encode a folder of images as the latents of an autoencoder, scaled to [-1, 1], in a Zarr group to train on.

    pip install 'udddm[images]' diffusers
    python examples/data/encode_latents.py train latents.zarr --size 256
    udddm-train --config imagenet-256-latents --set data.path=latents.zarr

Images are passed to the autoencoder in [-1, 1]. The mean and the standard deviation of each channel are measured over
`--measured` images, evenly spaced, before anything is stored. Each channel is stored as (z - mean) / (8 std), clamped
to [-1, 1]: training data lie in that range, and at 8 standard deviations clamping affects nothing that matters. `mean`,
`std` and `deviations` are attributes of the group: z = latents * deviations * std + mean.

For Stable Diffusion's autoencoder and ImageNet, expect means of (1.56, -0.695, 0.483, 0.729) and deviations of (5.27,
5.91, 4.21, 4.31) (Lu & Song 2024, arXiv 2410.11081, appendix G.1).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr

from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset

Encode = Callable[[torch.Tensor], torch.Tensor]
"""Returns the latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]."""
DEVIATIONS = 8


def autoencoder(name: str, device: str) -> Encode:
    """The encoder of a diffusers autoencoder; each latent is a sample of its distribution."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(name).eval().to(device)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = model.encode(images.to(device)).latent_dist.sample()
        return latents.float().cpu()

    return encode


def moments(images: ImageDataset, encode: Encode, count: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation of each channel of the latents [C] of `count` images, evenly spaced."""
    ids = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
    total: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0
    values = 0
    for some in np.array_split(ids, -(-len(ids) // batch)):
        z = encode(images.batch(some)[0]).double().numpy()
        total, squares = total + z.sum((0, 2, 3)), squares + np.square(z).sum((0, 2, 3))
        values += z[:, 0].size
    mean = np.asarray(total) / values
    return mean, np.sqrt(np.asarray(squares) / values - mean**2)


def write(images: ImageDataset, encode: Encode, target: Path, *, measured: int, batch: int, shard: int) -> float:
    """Write the latents and labels of all images. Returns the fraction of values that were clamped."""
    mean, std = moments(images, encode, measured, batch)
    print(f"mean of each channel: {mean.round(4).tolist()}")
    print(f"standard deviation of each channel: {std.round(4).tolist()}", flush=True)
    at, by = (torch.from_numpy(each).float()[:, None, None] for each in (mean, DEVIATIONS * std))
    shape = tuple(encode(images.batch(np.arange(1))[0]).shape[1:])
    group = zarr.create_group(target)
    group.attrs.update({"mean": mean.tolist(), "std": std.tolist(), "deviations": DEVIATIONS})
    latents = group.create_array(
        "images", shape=(len(images), *shape), dtype="float16", chunks=(1, *shape), shards=(shard, *shape)
    )
    labels, beyond = np.zeros(len(images), np.int64), 0
    for start in range(0, len(images), shard):
        rows = []
        stop = min(start + shard, len(images))
        for first in range(start, stop, batch):
            ids = np.arange(first, min(first + batch, stop))
            pixels, own = images.batch(ids)
            if own is not None:
                labels[ids] = own
            scaled = (encode(pixels) - at) / by
            beyond += int((scaled.abs() > 1).sum())
            rows.append(scaled.clamp(-1, 1))
        latents[start:stop] = torch.cat(rows).half().numpy()
    if images.labelled:
        group.create_array("labels", data=labels, config={"write_empty_chunks": True})
    return beyond / (len(images) * np.prod(shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the images, in one folder per class")
    parser.add_argument("target", type=Path, help="the Zarr group to create")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--autoencoder", default="stabilityai/sd-vae-ft-mse", help="name or path for diffusers")
    parser.add_argument("--measured", type=int, default=10_000, help="images whose latents are measured first")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    images = ImageDataset(load_dataset(DataConfig(name="folder", path=arguments.folder, size=arguments.size)))
    encode = autoencoder(arguments.autoencoder, arguments.device)
    clamped = write(images, encode, arguments.target, measured=arguments.measured, batch=arguments.batch, shard=4096)
    print(f"{clamped:.2g} of the values were clamped at {DEVIATIONS} standard deviations")


if __name__ == "__main__":
    main()
