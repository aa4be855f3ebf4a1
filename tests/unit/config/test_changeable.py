"""Only the marked keys may change between two starts of a run."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from udddm.config import RunConfig, load_config

CHANGEABLE = {
    "data.path",
    "data.condition.path",
    "data.workers",
    "data.missing_chunks",
    "data.expect",
    "store",
    "train.grad_accumulation",
    "train.spike_factor",
    "train.power_ema_every_steps",
    "train.torch_threads",
    "train.compile",
    "train.recompute",
    "train.cuda_graphs",
    "train.channels_last",
    "train.tf32",
    "train.deterministic",
    "engine",
    "checkpoint",
    "sample",
    "evaluate",
    "published",
    "log_every_steps",
    "loggers",
    "profile_steps",
}


def test_the_changeable_keys_are_listed() -> None:
    assert RunConfig.changeable() == CHANGEABLE


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += leaves(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def changed(config: RunConfig, key: str) -> RunConfig:
    """Returns a copy in which `key` has an otherwise impossible value, without validation."""
    names = key.split(".")
    sections: list[Any] = [config]
    for name in names[:-1]:
        sections.append(getattr(sections[-1], name))
    value: Any = "changed"
    for name, section in zip(reversed(names), reversed(sections), strict=True):
        value = section.model_copy(update={name: value})
    assert isinstance(value, RunConfig)
    return value


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("key", leaves(RunConfig))
def test_a_key_is_in_the_fingerprint_unless_it_or_its_section_is_marked(key: str) -> None:
    config = RunConfig()
    marked = key in CHANGEABLE or key.split(".")[0] in CHANGEABLE
    assert (changed(config, key).fingerprint() == config.fingerprint()) == marked


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("store={kind: zarr, dtype: fp16, prefetch: 7}", True),
        ("engine={name: deepspeed, zero: 2}", True),
        ("data.expect={samples: 3, shape: [1, 8, 8]}", True),
        ("train.compile=true", True),
        ("published={1: {fid: 2.0}}", True),
        ("train.learning_rate=1e-3", False),
        ("objective.chain.length=3", False),
        ("order.lanes=4", False),
        ("seed=1", False),
    ],
)
def test_overrides_of_marked_keys_alone_leave_the_fingerprint(override: str, same: bool) -> None:
    config = load_config(None, ["train.steps=10", override])
    assert (config.fingerprint() == load_config(None, ["train.steps=10"]).fingerprint()) == same
