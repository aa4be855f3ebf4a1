"""`train.optimizer`, weight decay, and the schedule of the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm import api, networks
from udddm.backends import engines
from udddm.backends.distributed.ranks import join
from udddm.backends.engines import deepspeed_config
from udddm.backends.engines.base import Engine
from udddm.config import RunConfig, resolve
from udddm.data import ArrayImages
from udddm.errors import ConfigError

IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (32, 1, 4, 4), dtype=np.uint8))
KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}


def config(**train: Any) -> RunConfig:
    return resolve(
        {
            "network": {
                "base_channels": 8,
                "channel_mult": [1],
                "blocks_per_level": 1,
                "attention_resolutions": [],
                "condition": "none",
            },
            "objective": {"name": "ict"},
            "train": {"steps": 12, "batch_size": 16, "torch_threads": 1, **train},
            "checkpoint": {"every_steps": 7},
            "sample": {"every_steps": 0},
        }
    )


def engine(chosen: RunConfig, steps: int = 12) -> Engine:
    return engines.build(networks.for_run(chosen, (1, 4, 4)), chosen, join("cpu"), steps)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_run_with_each_optimizer_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    chosen = config(optimizer=name, weight_decay=0.0 if name == "adam" else 0.1)
    assert type(engine(chosen).adam) is KINDS[name]
    whole = api.train(chosen, IMAGES, run_dir=tmp_path / "run", device="cpu")
    (tmp_path / "run" / "result.json").unlink()
    (max((tmp_path / "run" / "checkpoints").iterdir()) / "manifest.json").unlink()
    resumed = api.train(chosen, IMAGES, run_dir=tmp_path / "run", device="cpu")
    assert resumed.weights_sha256 == whole.weights_sha256 and resumed.ema_sha256 == whole.ema_sha256


def test_weight_decay_is_decoupled() -> None:
    """With a gradient of 0, every step multiplies a weight by 1 - rate * decay."""
    for name in ("adamw", "radam"):
        one = engine(config(optimizer=name, weight_decay=0.5, learning_rate=0.1))
        before = {key: value.clone() for key, value in one.weights().items()}
        for parameter in one.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        one.adam.step()
        for key, value in one.weights().items():
            torch.testing.assert_close(value, before[key] * 0.95)
    with pytest.raises(ConfigError, match=r"weight_decay 0.5 needs optimizer adamw or radam"):
        config(weight_decay=0.5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_learning_rate_starts_again_at_the_given_fraction(schedule: str) -> None:
    settings = {"learning_rate": 1.0, "warmup_steps": 4, "lr_schedule": schedule}
    whole = engine(config(**settings, lr_restart=0.25), 80)
    first, second = engine(config(**settings), 20), engine(config(**settings), 60)
    expected = [first.learning_rate(step) for step in range(20)] + [second.learning_rate(step) for step in range(60)]
    assert [whole.learning_rate(step) for step in range(80)] == expected
    assert whole.learning_rate(20) == 0.25 and whole.learning_rate(23) == 1.0


@pytest.mark.parametrize("name", list(KINDS))
def test_deepspeed_is_told_the_same_optimizer(name: str) -> None:
    chosen = config(optimizer=name, weight_decay=0.0 if name == "adam" else 0.1)
    chosen = chosen.model_copy(update={"engine": chosen.engine.model_copy(update={"name": "deepspeed", "zero": 1})})
    settings = deepspeed_config.resolve(chosen, 1)
    assert settings["zero_allow_untested_optimizer"] == (name == "radam")
    wrong = {"optimizer": {"type": "SGD", "params": {"weight_decay": 0.3}}}
    chosen = chosen.model_copy(update={"engine": chosen.engine.model_copy(update={"deepspeed": wrong})})
    with pytest.raises(ConfigError, match=r"(?s)optimizer.type.*train.optimizer.*weight_decay.*train.weight_decay"):
        deepspeed_config.resolve(chosen, 1)


def test_the_embedding_of_the_noise_level_takes_the_configured_frequency() -> None:
    chosen = config()
    usual = networks.for_run(chosen, (1, 4, 4))
    other = chosen.model_copy(update={"network": chosen.network.model_copy(update={"max_frequency": 1.0})})
    assert usual.noise_embedding.max_frequency == 16
    assert networks.for_run(other, (1, 4, 4)).noise_embedding.max_frequency == 1
