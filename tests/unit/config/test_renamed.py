"""Old names of keys are accepted with a warning. If both names are given, the old one is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from udddm.config import RunConfig, load_config, resolve
from udddm.config.renamed import RENAMED, current_key, modernize
from udddm.errors import ConfigError


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.setattr(logging.getLogger("udddm"), "propagate", True)
    caplog.set_level(logging.WARNING, "udddm")
    return lambda: [record.getMessage() for record in caplog.records]


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("old", list(RENAMED))
def test_an_old_key_is_accepted_in_a_file_and_in_an_override(old: str) -> None:
    new = current_key(old)
    value = resolve({}).model_dump()
    for part in new.split("."):
        value = value[part]
    assert modernize(nested(old, value)) == (nested(new, value), [f"{old} is now {RENAMED[old]}"])
    assert current_key(new) == new and modernize(nested(new, value)) == (nested(new, value), [])


def test_keys_within_a_renamed_section_are_renamed_too() -> None:
    assert current_key("objective.consistency.first") == "objective.ict.s0"
    assert current_key("process.sigma_max") == "schedule.sigma_max"
    config = load_config(None, ["objective.consistency.first=20", "process.sigma_max=30"])
    assert config.objective.ict.s0 == 20 and config.schedule.sigma_max == 30
    found, replaced = modernize({"objective": {"consistency": {"first": 20}}})
    assert found == {"objective": {"ict": {"s0": 20}}} and len(replaced) == 2


def test_renaming_does_not_modify_its_input() -> None:
    tree = {"network": {"width": 8}, "process": {"kind": "vp"}}
    modernize(tree)
    assert tree == {"network": {"width": 8}, "process": {"kind": "vp"}}


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("process: {kind: vp, timesteps: 50}\nnetwork: {width: 16}", ["schedule.rho=5", "network.channel_mult=[1, 2]"]),
        (
            "schedule: {kind: vp, timesteps: 50}\nnetwork: {base_channels: 16}",
            ["process.rho=5", "network.multipliers=[1, 2]"],
        ),
        (
            "process: {kind: ve}",
            ["process={kind: vp, timesteps: 50}", "schedule.rho=5", "network={width: 16, multipliers: [1, 2]}"],
        ),
        (
            "",
            [
                "schedule={kind: vp, timesteps: 9}",
                "process.timesteps=50",
                "process.rho=5",
                "network.channel_mult=[1, 2]",
                "network.width=16",
            ],
        ),
        (
            "",
            [
                "process={kind: vp, timesteps: 50, rho: 5}",
                "network={width: 4, multipliers: [1, 2]}",
                "network.base_channels=16",
            ],
        ),
    ],
)
def test_the_last_of_an_old_and_a_new_name_wins(preset: str, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(preset)
    wanted = {
        "schedule": {"kind": "vp", "timesteps": 50, "rho": 5.0},
        "network": {"base_channels": 16, "channel_mult": [1, 2]},
    }
    assert load_config(tmp_path / "preset.yaml", overrides) == resolve(wanted)


@pytest.mark.parametrize(
    ("tree", "reported"),
    [
        ({"process": {"kind": "vp"}, "schedule": {"kind": "ve"}}, "process: unknown key"),
        ({"schedule": {"kind": "ve"}, "process": {"kind": "vp"}}, "process: unknown key"),
        ({"network": {"width": 8, "base_channels": 16}}, "network.width: unknown key"),
        ({"train": {"steps": 1, "grad_clip": 1.0, "clip": 2.0}}, "train.clip: unknown key"),
        ({"objective": {"ict": {"s0": 10}, "consistency": {"last": 20}}}, "objective.consistency: unknown key"),
    ],
)
def test_if_both_names_are_given_the_old_one_is_reported(tree: dict[str, Any], reported: str) -> None:
    with pytest.raises(ConfigError, match=reported) as caught:
        resolve(tree)
    assert len(str(caught.value).splitlines()) == 1


def test_a_source_with_old_names_is_reported_once(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("process: {kind: vp}\nnetwork: {width: 16, blocks: 1}\ntrain: {steps: 3, clip: 1.0}\n")
    load_config(path, ["train.decay=cosine", "network={width: 8}"])
    assert warnings() == [
        f"{path} uses old names, which are still accepted: process is now schedule; network.width is now "
        "network.base_channels; network.blocks is now network.blocks_per_level; train.clip is now train.grad_clip",
        "train.decay=cosine uses old names, which are still accepted: train.decay is now train.lr_schedule",
        "network={width: 8} uses old names, which are still accepted: network.width is now network.base_channels",
    ]


def test_current_names_are_read_without_a_warning(warnings: Callable[[], list[str]]) -> None:
    resolve(RunConfig().model_dump(mode="json"))
    load_config(None, ["schedule.kind=vp", "network={base_channels: 8}"])
    assert warnings() == []
