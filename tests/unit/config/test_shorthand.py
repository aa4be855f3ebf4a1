"""Short ways to write a setting, in overrides, files and dictionaries."""

from __future__ import annotations

from typing import Any

import pytest

from udddm.config import RunConfig, keys_set, load_config, resolve
from udddm.config.mistakes import keys_of
from udddm.config.shorthand import ALIASES, SELECTORS
from udddm.config.trust import DATA, reaching
from udddm.errors import ConfigError


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("lr=3e-4", "train.learning_rate=3e-4"),
        ("batch_size=256", "train.batch_size=256"),
        ("steps=7", "train.steps=7"),
        ("classes=4", "network.classes=4"),
        ("ema=0.5", "train.ema=[0.5]"),
        ("train.ema=0.9,0.99", "train.ema=[0.9, 0.99]"),
        ("train.betas=0.9,0.99", "train.betas=[0.9, 0.99]"),
        ("network.channel_mult=1", "network.channel_mult=[1]"),
        ("evaluate.metrics=kid", "evaluate.metrics=[kid]"),
        ("evaluate.metrics=frechet,kid", "evaluate.metrics=[frechet, kid]"),
        ("objective=ict", "objective.name=ict"),
        ("objective=denoiser", "objective.name=edm"),
        ("store=zarr", "store.kind=zarr"),
        ("network=own:Network", "network.name=own:Network"),
        ("engine=deepspeed", "engine.name=deepspeed"),
        ("schedule=vp", "schedule.kind=vp"),
        ("process=vp", "schedule.kind=vp"),
        ("data=cifar10", "data.name=cifar10"),
    ],
)
def test_a_short_form_is_the_long_one(short: str, full: str) -> None:
    assert load_config("cifar10", [short]) == load_config("cifar10", [full]) != load_config("digits")
    assert keys_set(short) == keys_set(full)


def test_a_name_for_a_section_keeps_its_other_settings() -> None:
    config = load_config("digits", ["objective=ect"])
    assert (config.objective.name, config.objective.pretrain, config.objective.refined.share) == ("ect", 0.2, 0.5)


def test_every_alias_and_selector_names_an_existing_key() -> None:
    keys = set(keys_of(RunConfig))
    assert set(ALIASES.values()) <= keys
    assert not set(ALIASES) & keys  # a key at the top level is no short name
    assert {f"{section}.{key}" for section, key in SELECTORS.items()} <= keys


def test_files_and_dictionaries_take_names_for_sections_and_scalars_for_lists() -> None:
    given: dict[str, Any] = {"objective": "ict", "process": "vp", "train": {"steps": 3, "ema": 0.5}}
    assert resolve(given) == resolve(
        {"objective": {"name": "ict"}, "schedule": {"kind": "vp"}, "train": {"steps": 3, "ema": [0.5]}}
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train=3", r"train: this is a section; set one of its keys, such as train\.epochs="),
        ("objective=null", r"set one of its keys, such as objective\.name="),
        ("train.betas=0.9", r"train\.betas: give a list such as \[0\.9, 0\.999\] \(got 0\.9\)"),
        ("ema=many", r"train\.ema\.0: give a number \(got 'many'\)"),
        ("objective=itc", "objective.name: unknown objective 'itc'; did you mean ict"),
        ("train.lr=3", r"train\.lr: unknown key; did you mean train\.learning_rate\?"),
        ("train.classes=3", r"train\.classes: unknown key; did you mean network\.classes\?"),
    ],
)
def test_what_a_short_form_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits", [override])


def test_a_short_form_vouches_only_for_what_it_sets() -> None:
    theirs = load_config(None, ["data={name: folder, path: /etc}"])
    assert reaching(theirs, DATA, ["data=folder"]) == reaching(theirs, DATA, ["data={name: folder}"])
    assert reaching(theirs, DATA, ["data=folder"]) == ["data.path=/etc"]
    assert reaching(theirs, DATA, ["data={path: /etc}"]) == []
