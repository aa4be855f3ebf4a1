"""`dit` and `ddpmpp` against published parameter counts and against independent implementations, diffusers'."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

from udddm.config import NetworkConfig, load_config
from udddm.networks import outline
from udddm.networks.dit import positions

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "training"))
from published_networks import CIFAR, LATENTS, ddpmpp_distance, parameters


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameters_of_dit_are_the_published_ones(size: str, millions: int) -> None:
    """Peebles & Xie 2023, Table 4, patch 2: latents of 256x256 images, 1,000 classes, learned variances."""
    config = NetworkConfig(name="dit", settings={"size": size}, classes=1000, condition="none")
    network = outline(config, LATENTS)
    variances = (network.positions.shape[1] + 1) * 4 * 2**2
    assert round(parameters(network) / 1e6) == round((parameters(network) + variances) / 1e6) == millions
    if size == "XL":  # of the paper's code, which also counts the fixed positions
        assert parameters(network) + variances + network.positions.numel() == 675_129_632


@pytest.mark.parametrize(("classes", "count"), [(0, 55_733_891), (10, 55_735_299)])
def test_parameters_of_ddpmpp_are_those_of_edm(classes: int, count: int) -> None:
    """55.7 M (Karras et al. 2022). `count` is of EDM's code with its augmentation input, which is left out here."""
    network = outline(load_config("cifar10-ddpmpp").network.model_copy(update={"classes": classes}), CIFAR)
    assert parameters(network) + 9 * 128 == count


def test_the_preset_of_dit_is_dit_b_2() -> None:
    config = load_config("imagenet-256-latents-dit")
    assert config.data.expect is not None
    assert round(parameters(outline(config.network, config.data.expect.shape)) / 1e6) == 130


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    found = positions(3, 5, 8).view(3, 5, 8)
    for row in range(3):
        for column in range(5):
            for half, at in ((0, column), (1, row)):
                angles = [at * 10000 ** (-k / 2) for k in range(2)]
                expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                torch.testing.assert_close(found[row, column, 4 * half : 4 * half + 4], torch.tensor(expected))


@pytest.mark.parametrize("multipliers", [(1, 2), (2, 1, 1)])
def test_ddpmpp_equals_a_network_of_diffusers_blocks(multipliers: tuple[int, ...]) -> None:
    """The comparison of the benchmark, on a small network."""
    pytest.importorskip("diffusers")
    config = NetworkConfig(
        name="ddpmpp",
        base_channels=128,
        channel_mult=multipliers,
        blocks_per_level=1,
        attention_resolutions=(4,),
        classes=4,
        condition="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers' imports
        assert ddpmpp_distance(config, (3, 8, 8)) < 1e-6
