"""The base class and common types of the sections of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
UnderOne = Annotated[float, Field(ge=0, lt=1)]


CHANGEABLE: dict[str, JsonValue] = {"changeable": True}
"""`json_schema_extra` of a field that may change between two starts of a run, as it does not affect the weights."""


class Section(BaseModel):
    """A section of the configuration: a frozen pydantic model that rejects unknown keys and non-finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
