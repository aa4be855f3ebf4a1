"""The configuration section `evaluate`, and what is common to it and to the options of `udddm evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator, model_validator

from udddm.config.base import Section, unit
from udddm.config.plugins import METRICS

PUBLISHED_NETWORKS = ("inception", "dinov2")
"""The names of the feature networks whose published weights are found or downloaded."""


def split_networks(text: str) -> tuple[str, ...]:
    """The feature networks that `text` names, separated by commas.

    Raises ValueError for an empty name or a repetition.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(f"{text!r}: " + (f"{name} is named twice" if name else "a name is empty"))
    return names


def check_weights(networks: Sequence[str], weights: Mapping[str, str | None], setting: str, selected_by: str) -> None:
    """Raise ValueError for weights of a published network that is not one of `networks`, and would be ignored."""
    for name, place in weights.items():
        if place is not None and name not in networks:
            raise ValueError(f"{setting.format(name)} has no effect, because {selected_by} does not name {name}")


class EvaluateConfig(Section):
    """Scores of the first EMA during training (udddm-evaluate scores a finished run)."""

    every_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between evaluations; 0 disables them", json_schema_extra=unit("steps")
    )
    count: Annotated[int, Field(ge=2)] = Field(
        2000, description="number of samples per evaluation, drawn between two steps", json_schema_extra=unit("samples")
    )
    features: tuple[str, ...] = Field(
        ("inception",),
        min_length=1,
        description="feature networks: inception, dinov2, a TorchScript file, or package.module:function",
    )
    metrics: tuple[Annotated[str, AfterValidator(METRICS.check)], ...] = Field(
        tuple(METRICS.members), description="metrics: names, or package.module:function"
    )
    inception_weights: str | None = Field(
        None,
        description="file or http(s) URL of Inception's weights, followed by #sha256=HEX if they are not the published "
        "ones; unset: the published ones, downloaded once (docs/evaluation.md)",
    )
    dinov2_weights: str | None = Field(
        None, description="the same for DINOv2 (ViT-S, B or L with patches of 14 pixels)"
    )
    reference: str | None = Field(
        None,
        description=".npz file of reference statistics or images instead of those of the data set (docs/evaluation.md)",
    )

    @field_validator("features")
    @classmethod
    def _separated(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return split_networks(",".join(values))

    @model_validator(mode="after")
    def _used(self) -> EvaluateConfig:
        check_weights(self.features, self.weights, "{}_weights", "features")
        return self

    @property
    def weights(self) -> dict[str, str | None]:
        """The place of the weights of each published feature network; None for the default."""
        return {"inception": self.inception_weights, "dinov2": self.dinov2_weights}
