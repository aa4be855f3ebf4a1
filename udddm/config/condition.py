"""The configuration section `data.condition`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from udddm.config.base import Section, unit


class ConditionConfig(Section):
    """The conditioning image of each visit, if it comes from the data (docs/tasks.md)."""

    kind: Literal["none", "downscale", "mask", "gray", "pairs"] = Field(
        "none",
        description="none: what the objective uses; downscale, mask and gray: the image itself at a lower resolution, "
        "without a rectangle, or without color; pairs: the second image of the samples of a paired data set",
    )
    factor: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="downscale: side of the pixel blocks of which only the mean is shown",
        json_schema_extra=unit("pixels"),
    )
    largest: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="mask: largest sides of the hidden rectangle, relative to the image's; the smallest are half of "
        "them. Size and place depend on the noise of a visit; unset: 0.5",
        json_schema_extra=unit("fraction of the side"),
    )

    @model_validator(mode="after")
    def _used(self) -> ConditionConfig:
        if self.kind == "downscale" and self.factor is None:
            raise ValueError("kind 'downscale' needs factor, such as 4")
        for name, kind in (("factor", "downscale"), ("largest", "mask")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"{name} is for kind '{kind}', not '{self.kind}': remove it, or set kind: {kind}")
        return self

    @property
    def used(self) -> bool:
        """Whether the conditioning image comes from the data."""
        return self.kind != "none"
