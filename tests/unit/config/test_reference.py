"""The page of all settings is current, and the schema admits what is valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field

from udddm.config import RunConfig, plugins, presets, reference
from udddm.config.mistakes import keys_of
from udddm.config.plugins import Registry
from udddm.config.shorthand import ALIASES

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference.markdown(), f"run: udddm config reference > {PAGE.name}, in docs/"


def test_the_page_has_every_key_once() -> None:
    rows = [line.split("`")[1] for line in reference.markdown().splitlines() if line.startswith("| `")]
    keys = [row for row in rows if not row.endswith(("=", "=NAME"))]
    settings = [
        f"{registry.key.rpartition('.')[0]}.settings.{key}"
        for registry, _, model in reference.plugin_settings()
        for key in model.model_fields
    ]
    assert {"network.settings.size", "network.settings.rescale"} <= set(settings)
    own = {*keys_of(RunConfig), "objective.chain.stages.start", "objective.chain.stages.levels"}
    assert sorted(keys) == sorted([*own, *settings])
    assert {f"{alias}=" for alias in ALIASES} <= set(rows)


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("train.steps", "| whole number > 0 | unset | steps |"),
        ("store.memory_mb", " * | whole number > 0 | unset | MB |"),
        ("train.precision", "| `fp32`, `bf16`, `fp16` | `fp32` |"),
        ("schedule.kind", "| `ve`, `vp` or `package.module:function` | `ve` |"),
        ("train.betas", "| 2 values, number ≥ 0, < 1 | `[0.9, 0.999]` |"),
        ("seed", "| whole number ≥ 0, < 2^63 | `0` |"),
        ("data.expect.samples", "| required | samples |"),
    ],
)
def test_a_row_has_type_default_and_unit(key: str, row: str) -> None:
    line = next(line for line in reference.markdown().splitlines() if line.startswith(f"| `{key}`"))
    assert row in line


class OwnSettings(BaseModel):
    size: int = Field(3, description="how large")


def own(context: object, settings: OwnSettings) -> None:
    raise AssertionError


def test_settings_of_members_are_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "Settings", OwnSettings, raising=False)
    registry = Registry("network", "network.name", {"mine": f"{__name__}:own", "gone": "not_installed:Network"})
    monkeypatch.setattr(plugins, "NETWORKS", registry)
    page = reference.markdown()
    assert "## Settings of network `mine`" in page
    assert "| `network.settings.size` | whole number | `3` |  | how large |" in page


@pytest.fixture(scope="module")
def validate() -> Callable[[Any], None]:
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(json.loads(reference.schema())).validate  # type: ignore[no-any-return]


@pytest.mark.parametrize("preset", presets.names())
def test_the_schema_admits_every_preset(preset: str, validate: Callable[[Any], None]) -> None:
    given = yaml.safe_load(presets.text_of(preset))
    validate(given)
    validate(RunConfig.model_validate(given).model_dump(mode="json"))


@pytest.mark.parametrize(
    "given",
    [
        {"objective": "ict", "store": "zarr"},
        {"train": {"steps": 3, "ema": 0.9}, "evaluate": {"metrics": "kid"}},
        {"network": {"name": "own.module:Network"}},
        {"objective": {"name": "tuning"}},
    ],
)
def test_the_schema_admits_short_forms(given: Any, validate: Callable[[Any], None]) -> None:
    validate(given)


@pytest.mark.parametrize(
    "given",
    [
        {"trian": {}},
        {"train": {"lerning_rate": 1}},
        {"train": {"steps": "many"}},
        {"store": {"kind": "s4"}},
        {"train": 3},
    ],
)
def test_the_schema_refuses_what_is_wrong(given: Any, validate: Callable[[Any], None]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        validate(given)
