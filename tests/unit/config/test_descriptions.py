"""Every key of the configuration is documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from udddm.config import RunConfig, Section


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


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_has_a_description(key: str) -> None:
    assert FIELDS[key].description


def test_every_section_has_a_docstring() -> None:
    found = {section for field in FIELDS.values() for section in sections_of(field.annotation)} | {RunConfig}
    assert not [section.__name__ for section in found if not section.__doc__ or section.__doc__ == Section.__doc__]
