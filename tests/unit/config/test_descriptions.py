"""Every key of the configuration is documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from udddm.config import RunConfig, Section
from udddm.config.reference import plugin_settings


def sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a type, such as `ExpectConfig | None` or `tuple[Stage, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_of(inner)


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a section and of its subsections, by dotted key."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for section in sections_of(field.annotation):
            yield from fields_of(section, f"{prefix}{name}.")


FIELDS = dict(fields_of(RunConfig))
PLUGIN_FIELDS = {
    f"{registry.key} {name}: {key}": field
    for registry, name, model in plugin_settings()
    for key, field in fields_of(model)
}
"""The settings of built-in members of plug points."""
DIMENSIONLESS = {
    *("seed", "data.expect.shape", "data.expect.classes", "published"),
    *("schedule.beta_min", "schedule.beta_max", "schedule.rho"),
    *("network.channel_mult", "network.dropout", "network.classes"),
    *(
        "objective.pretrain_dropout",
        "objective.guidance",
        "objective.huber_c",
        "objective.ect.q",
        "objective.ect.k",
        "objective.ect.b",
        "objective.refined.min_sharpness",
    ),
    *("order.lanes", "engine.zero", "sample.guidance"),
    *("train.learning_rate", "train.weight_decay", "train.betas", "train.grad_clip", "train.ema", "train.spike_factor"),
}
"""Numbers without a unit."""


@pytest.mark.parametrize("key", [*FIELDS, *PLUGIN_FIELDS])
def test_every_key_has_a_description(key: str) -> None:
    assert (FIELDS | PLUGIN_FIELDS)[key].description


def numbers(annotation: Any) -> bool:
    """Whether values of a type are or contain numbers."""
    return annotation in (int, float) or any(numbers(inner) for inner in get_args(annotation))


def test_every_number_has_a_unit_unless_it_is_dimensionless() -> None:
    without = {
        key
        for key, field in FIELDS.items()
        if numbers(field.annotation) and "unit" not in (field.json_schema_extra or {})  # type: ignore[operator]
    }
    assert without == DIMENSIONLESS


def test_every_section_has_a_docstring() -> None:
    found = {section for field in FIELDS.values() for section in sections_of(field.annotation)} | {RunConfig}
    assert not [section.__name__ for section in found if not section.__doc__ or section.__doc__ == Section.__doc__]
