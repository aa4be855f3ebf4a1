"""The configuration section `data.condition`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from udddm.config.base import CHANGEABLE, Section, unit


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

    path: str | None = Field(
        None,
        description="pairs: path or fsspec URL of the conditioning images, if they are apart from the images: a folder "
        "or ZIP archive with the same file names, or an array of the same length",
        json_schema_extra=CHANGEABLE,
    )
    image: str | None = Field(
        None,
        description="pairs: the conditioning images in the same data set. webdataset: their extension within a sample "
        "(default: condition.png and the like); huggingface: their column (default: condition or conditioning_image); "
        "array: the name of their array (default: conditions)",
    )

    @model_validator(mode="after")
    def _used(self) -> ConditionConfig:
        if self.kind == "downscale" and self.factor is None:
            raise ValueError("kind 'downscale' needs factor, such as 4")
        for name, kind in (("factor", "downscale"), ("largest", "mask"), ("path", "pairs"), ("image", "pairs")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"{name} is for kind '{kind}', not '{self.kind}': remove it, or set kind: {kind}")
        if self.path is not None and self.image is not None:
            raise ValueError(
                "path is for conditioning images apart from the images, and image for those among them: give one"
            )
        return self

    @property
    def used(self) -> bool:
        """Whether the conditioning image comes from the data."""
        return self.kind != "none"
