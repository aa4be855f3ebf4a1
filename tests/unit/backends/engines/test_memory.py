"""The memory of a run, counted before its first step."""

from __future__ import annotations

import re

import pytest

from udddm.backends.engines import memory
from udddm.config import load_config
from udddm.errors import ConfigError

SHAPE = (3, 32, 32)
SETTINGS = ["train.precision=bf16", "train.batch_size=4096", "train.steps=1", "network.base_channels=64"]


def check(total: float, *settings: str, world: int = 1) -> None:
    memory.check_fits(load_config("cifar10", [*SETTINGS, *settings]), SHAPE, world, total, "a GPU")


def test_a_run_that_does_not_fit_names_the_accumulation_that_does() -> None:
    with pytest.raises(
        ConfigError, match=r"micro-batch of 4096 images takes about .* GB, and a GPU has 16.0 GB"
    ) as found:
        check(16e9)
    parts = re.search(r"set train\.grad_accumulation=(\d+) \(it is 1\)", str(found.value))
    assert parts
    assert "recompute" not in str(found.value)  # too little for so many images
    check(16e9, f"train.grad_accumulation={parts[1]}")
    config = load_config("cifar10", [*SETTINGS, f"train.grad_accumulation={parts[1]}"])
    assert memory.needed(config, SHAPE).of(4096 // int(parts[1])) <= 0.95 * 16e9


def test_a_run_that_fits_starts() -> None:
    check(200e9)
    check(40e9, world=8)


def test_nothing_helps_a_network_that_is_too_large() -> None:
    with pytest.raises(ConfigError, match="use a smaller network or a larger GPU"):
        check(1e9, "network.base_channels=512")


def test_others_networks_and_deepspeed_are_not_counted() -> None:
    check(1e6, "network.name=somebody.network:build")
    check(1e6, "engine.name=deepspeed")


def test_what_fits_when_it_is_computed_again_says_so() -> None:
    few = load_config("cifar10", [*SETTINGS, "train.batch_size=64"])
    total = 0.9 * memory.needed(few, SHAPE).of(64)
    with pytest.raises(ConfigError, match=r"or set train.recompute=true$"):
        check(total, "train.batch_size=64")
    check(total, "train.batch_size=64", "train.recompute=true")
    assert not memory.recompute_suffices(load_config("cifar10", [*SETTINGS, "train.compile=true"]), SHAPE, 64, total)
