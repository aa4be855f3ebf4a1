"""A configuration for a data set that has none: `udddm train MY_FOLDER`.

The values are those of the presets `digits` and `fashion-mnist`, which were measured, and of the large presets, which
come from the literature, applied by the size, number and channels of the images and by the machine.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from udddm.backends.engines import memory
from udddm.config import DataConfig, NetworkConfig, RunConfig, resolve
from udddm.data import ImageDataset, load_dataset
from udddm.data.loading import FILES, open_files
from udddm.errors import ConfigError, DataError
from udddm.networks.cost import cost
from udddm.tools.dataset.place import common_size, measured_ids, section_of

FEWEST = 64
"""Images, of which there must be at least a batch."""
FEW = 20_000
"""Up to here iCT with refined pairs, as on the digits, and beyond ECT, as on Fashion-MNIST."""
MOST_CLASSES = 1000
SIDES = (128, 96, 64, 48, 32)
"""Sizes to which images of different sizes are resized."""
OPERATIONS = 3e14
"""Floating-point operations that a core does in about an hour and a half."""
ENOUGH = 200_000
"""Images that a run on a CPU should train on. Where it cannot in that time, its network has larger patches."""


@dataclass(frozen=True)
class Machine:
    """What a run has here."""

    cuda: bool
    gigabytes: float = 0.0
    """Memory of the GPU."""
    bf16: bool = True


def machine(device: str) -> Machine:
    """This machine, for the option --device."""
    if device == "cpu" or not torch.cuda.is_available():
        return Machine(False)
    total = torch.cuda.get_device_properties(0).total_memory
    return Machine(True, total / 1e9, torch.cuda.is_bf16_supported(including_emulation=False))


def data_section(where: str) -> dict[str, Any]:
    """The section `data` for any data set that `section_of` knows, with the size to which its images are resized.

    Raises ConfigError and DataError as `section_of` does.
    """
    found = section_of(where)
    if found["name"] not in FILES or importlib.util.find_spec("PIL") is None:  # reported when the data set is opened
        return found
    size = common_size(open_files(DataConfig(**found)), SIDES[2:], SIDES[2])
    return found if size is None else {**found, "size": size}


def choose(data: dict[str, Any], here: Machine) -> tuple[RunConfig, list[str]]:
    """The configuration for a data set, and the lines that explain it. Raises ConfigError and DataError."""
    base = resolve({"data": data, "train": {"steps": 1}})
    images = ImageDataset(load_dataset(base.data))
    given = "channels" if base.data.condition.used else "none"
    _, height, width = images.shape
    count = len(images)
    if count < FEWEST:
        where = data.get("path") or data["name"]
        raise DataError(f"{where}: {count} images are too few to train on; give {FEWEST} or more")
    pixels = images.batch(measured_ids(count))[0]
    sigma_data = float(f"{max(0.05, float(pixels.std())):.3g}")
    classes = images.classes if images.labelled and images.classes and images.classes <= MOST_CLASSES else 0

    side = max(height, width)
    network, train = _on_gpu(height, width, count) if here.cuda else _on_cpu(images.shape)
    if here.cuda:
        train["precision"] = "bf16" if here.bf16 else "fp16"
    batch = train["batch_size"] = _batch(train["batch_size"], count)
    seen = _images_seen(side, count, here, {**network, "condition": given}, images.shape)
    steps = train["steps"] = max(100, round(seen / batch))
    long = steps > 50_000
    train |= {"lr_schedule": "cosine", "betas": [0.9, 0.99], "ema": [0.9999 if long else 0.999], "ema_warmup": True}
    few = count <= FEW
    refined = {"refined": {"share": 0.5}} if few else {}
    objective = {"name": "ict" if few else "ect", "pretrain": 0.2 if few else 0.3, **refined}
    schedule = {
        "kind": "ve",
        "sigma_min": 0.05 if side <= 16 else 0.02 if side < 32 else 0.002 if here.cuda else 0.01,
        "sigma_max": 30.0 if side <= 16 else 50.0 if side < 32 else 80.0,
        "sigma_data": sigma_data,
        "preconditioning": "edm",
    }
    tree = {
        "data": data,
        "schedule": schedule,
        "network": {**network, "condition": given, "classes": classes},
        "objective": objective,
        "store": {"kind": "zarr", "dtype": "fp16"},
        "train": train,
        "checkpoint": {"every_steps": max(50, min(2000, steps // 20))},
        "sample": {"every_steps": max(50, steps // 8), "final": 1000},
    }
    tree["train"]["grad_accumulation"] = _accumulation(tree, images.shape, here)
    return resolve(tree), _explained(tree, images, here)


def _explained(tree: dict[str, Any], images: ImageDataset, here: Machine) -> list[str]:
    """The choice in lines, with the reasons."""
    data, network, schedule = tree["data"], tree["network"], tree["schedule"]
    objective, train, count = tree["objective"], tree["train"], len(images)
    few = "refined" in objective
    resized = f", resized to {data['size']}x{data['size']}" if data.get("size") else ""
    where = f"a GPU with {here.gigabytes:.0f} GB" if here.cuda else "a CPU"
    batch, steps, classes = train["batch_size"], train["steps"], network["classes"]
    return [
        f"data: {count:,} images of {'x'.join(map(str, images.shape))}{resized} in {data.get('path') or data['name']}",
        f"classes: {classes or 'none'}{', trained with labels' if classes else ''}",
        *_conditioned(data.get("condition") or {}),
        f"noise: sigma from {schedule['sigma_min']} to {schedule['sigma_max']:g}; sigma_data "
        f"{schedule['sigma_data']} (measured)",
        f"network: U-Net, {network['base_channels']} channels times {network['channel_mult']}, patch "
        f"{network['patch']}, {network['blocks_per_level']} blocks per level, dropout {network['dropout']} "
        f"(for {max(images.shape[1:])} pixels on {where})",
        f"objective: {objective['name']}{' with refined pairs' if few else ''}, after a denoiser for "
        f"{objective['pretrain']:.0%} of the run ({'at most' if few else 'more than'} {FEW:,} images)",
        f"length: {steps:,} steps of {batch} images, {steps * batch / count:,.0f} epochs; train.steps=N changes it",
        f"optimizer: Adam, learning rate {train['learning_rate']:g}, cosine; EMA {train['ema'][0]}; "
        f"{train.get('precision', 'fp32')}; micro-batches of {batch // train['grad_accumulation']}",
        "store: zarr in the run directory, if the objective reads the x0-state",
    ]


def _conditioned(section: dict[str, Any]) -> list[str]:
    """The line about conditioning images, if there are any."""
    kind = section.get("kind", "none")
    if kind == "none":
        return []
    where = section.get("path") or section.get("image")
    return [f"conditioning images: {kind}{f' in {where}' if where else ''}, as further input channels of the network"]


def _on_cpu(shape: tuple[int, int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Network and training for minutes to an hour on a core, as in the presets digits and fashion-mnist.

    A network with larger patches trains on more images in the same time. It is chosen where there would be fewer than
    `ENOUGH` otherwise, unless a patch would have more values than the network has channels.
    """
    side = max(shape[1:])
    patch = max(2, 1 << math.ceil(math.log2(max(1.0, side / 16))))
    network, larger = _cpu_network(shape, patch), _cpu_network(shape, 2 * patch)
    few = side > 16 and _affordable({**network, "condition": "none"}, shape) < ENOUGH
    if few and shape[0] * (2 * patch) ** 2 <= larger["base_channels"]:
        network = larger
    return network, {"batch_size": 64, "learning_rate": 7e-4, "warmup_steps": 100, "torch_threads": 1}


def _cpu_network(shape: tuple[int, int, int], patch: int) -> dict[str, Any]:
    grid = math.ceil(max(shape[1:]) / patch)
    return {
        "patch": patch,
        "base_channels": 64 if grid <= 4 or shape[0] > 1 else 48,
        "channel_mult": [1] if grid <= 4 else [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "dropout": 0.0,
    }


def _affordable(network: dict[str, Any], shape: tuple[int, int, int]) -> float:
    """The images that a core trains on with `OPERATIONS`."""
    counted = cost(NetworkConfig(**network), shape)
    return OPERATIONS / (counted.training + counted.forward)


def _on_gpu(height: int, width: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Network and training for hours on a GPU, after the presets cifar10 and ffhq-64."""
    side = max(height, width)
    patch = 1 if side <= 64 else 2
    levels = [1, 2] if side <= 16 else [1, 2, 2] if side <= 36 * patch else [1, 2, 2, 2]
    multiple = 2 ** (len(levels) - 1)
    rows = -(-height // (patch * multiple)) * multiple  # of the padded image
    sides = [rows >> level for level in range(len(levels))]
    network = {
        "patch": patch,
        "base_channels": 64 if side <= 16 else 128,
        "channel_mult": levels,
        "blocks_per_level": 2 if side <= 36 else 3,
        "attention_resolutions": [] if side <= 16 else [each for each in sides if each <= 16],
        "dropout": 0.3 if count <= 5_000 else 0.2 if count <= 100_000 else 0.1,
    }
    return network, {"batch_size": 256 if count > 5_000 else 128, "learning_rate": 2e-4, "warmup_steps": 1000}


def _batch(wanted: int, count: int) -> int:
    """The batch size: at most half of the images, and a power of two."""
    return min(wanted, 1 << int(math.log2(count // 2)))


def _images_seen(side: int, count: int, here: Machine, network: dict[str, Any], shape: tuple[int, int, int]) -> float:
    """The length of the run in images: what a core does within an hour or two, or a GPU within a day."""
    if not here.cuda:
        return max(100_000, min(384_000 if side <= 16 else 600_000, _affordable(network, shape)))
    return min(40e6 if side <= 36 else 80e6, max(2e6, 2000.0 * count))


def _accumulation(tree: dict[str, Any], shape: Sequence[int], here: Machine) -> int:
    """The smallest accumulation that fits the GPU. Raises ConfigError if none does."""
    if not here.cuda:
        return 1
    batch = tree["train"]["batch_size"]
    needed = memory.needed(resolve(tree), (shape[0], shape[1], shape[2]))
    parts = needed.accumulation(batch, 0.9e9 * here.gigabytes)
    if parts is None:
        raise ConfigError(f"no network for these images fits a GPU of {here.gigabytes:.0f} GB: give one with --config")
    return parts
