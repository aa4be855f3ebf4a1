"""The base class and common types of the sections of the configuration."""

from __future__ import annotations

import types
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
UnderOne = Annotated[float, Field(ge=0, lt=1)]


CHANGEABLE: dict[str, JsonValue] = {"changeable": True}
"""`json_schema_extra` of a field that may change between two starts of a run, as it does not affect the weights."""


def unit(name: str) -> dict[str, JsonValue]:
    """`json_schema_extra` of a field whose values have a unit."""
    return {"unit": name}


class Section(BaseModel):
    """A section of the configuration: a frozen pydantic model that rejects unknown keys and non-finite numbers.

    A number or a name is accepted where a list is meant: `ema: 0.9` is `ema: [0.9]`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if _is_list(field.annotation)}
        return {
            key: (value,) if key in lists and isinstance(value, str | int | float) else value
            for key, value in values.items()
        }


def _is_list(annotation: Any) -> bool:
    """Whether a type is a list of any length, or such a list or null."""
    options = [each for each in get_args(annotation) if each is not type(None)]
    if isinstance(annotation, types.UnionType) and len(options) == 1:
        annotation = options[0]
    return get_origin(annotation) is tuple and get_args(annotation)[-1] is Ellipsis
