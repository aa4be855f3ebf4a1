"""The sections that say what a visit trains (docs/method.md)."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from udddm.config.base import Fraction, Positive, Section, UnderOne
from udddm.config.plugins import OBJECTIVES


class Stage(Section):
    """From `start` (a fraction of the run) on, new chains use `levels` noise levels above the lowest."""

    start: Fraction
    levels: Annotated[int, Field(ge=1)]


class ChainConfig(Section):
    """The chain objective (docs/method.md): consistency training whose teacher is the x0-state store."""

    length: Positive | Literal["trajectory"] = Field(
        2, description="visits a chain lasts: 1 is consistency training, 'trajectory' climbs all levels from the lowest"
    )
    stages: tuple[Stage, ...] = Field(
        (Stage(start=0, levels=8), Stage(start=0.2, levels=16), Stage(start=0.5, levels=32)),
        min_length=1,
        description="how the number of levels M grows; each a multiple of the one before",
    )
    distribution: Literal["uniform", "lognormal"] = Field("uniform", description="of the level a chain begins at")
    p_mean: float = Field(-1.1, description="of ln sigma, lognormal")
    p_std: Annotated[float, Field(gt=0)] = Field(2.0, description="of ln sigma, lognormal")
    x0_weight: Literal["lowest", "visits"] = Field(
        "lowest", description="weight of x0 in the target: only at the lowest level, or Eq. 3's 1/(n+1) with n = level"
    )
    weighting: Literal["none", "gap"] = Field(
        "none", description="loss weight of a level: 1, or 1/(sigma_k - sigma_(k-1))"
    )

    @field_validator("stages")
    @classmethod
    def _nested(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if stages[0].start != 0:
            raise ValueError("the first stage must start at 0")
        for before, after in itertools.pairwise(stages):
            if after.start <= before.start:
                raise ValueError("stages must be in order of their start")
            if after.levels % before.levels:
                raise ValueError(f"levels must nest: {after.levels} is no multiple of {before.levels}")
        return stages


class ICTConfig(Section):
    """iCT (Song & Dhariwal 2023): consistency training without a store."""

    s0: Positive = Field(10, description="levels at the beginning; they double")
    s1: Positive = Field(1280, description="levels at the end")
    distribution: Literal["lognormal", "uniform"] = "lognormal"
    p_mean: float = Field(-1.1, description="of ln sigma")
    p_std: Annotated[float, Field(gt=0)] = Field(2.0, description="of ln sigma")
    weighting: Literal["none", "gap"] = Field("gap", description="1, or 1/(sigma_k - sigma_(k-1))")

    @model_validator(mode="after")
    def _ordered(self) -> ICTConfig:
        if self.s1 < self.s0:
            raise ValueError(f"s1 ({self.s1}) must be at least s0 ({self.s0})")
        return self


class ECTConfig(Section):
    """Easy Consistency Tuning (Geng et al. 2024): r = sigma (1 - n(sigma)/q^a), n = 1 + k sigmoid(-b sigma)."""

    q: Annotated[float, Field(gt=1)] = 2.0
    k: Annotated[float, Field(ge=0)] = 8.0
    b: Annotated[float, Field(ge=0)] = 1.0
    length: Positive = Field(
        1, description="visits a chain lasts: 1 is ECT, above it all targets but the first come from the store"
    )
    stages: Positive = Field(8, description="a = 1, 2, ..., stages over the run")
    p_mean: float = Field(-1.1, description="of ln sigma")
    p_std: Annotated[float, Field(gt=0)] = Field(2.0, description="of ln sigma")


class EDMConfig(Section):
    """The EDM denoiser (Karras et al. 2022), alone or as pretraining."""

    p_mean: float = Field(-1.2, description="of ln sigma")
    p_std: Annotated[float, Field(gt=0)] = Field(1.2, description="of ln sigma")


class ObjectiveConfig(Section):
    name: Annotated[str, AfterValidator(OBJECTIVES.check)] = Field(
        "chain",
        description="chain, ict, ect, edm (a denoiser), uddm (the paper's Algorithm 1), or package.module:factory",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of an objective of your own")
    pretrain: UnderOne | None = Field(
        None,
        description="share of the run that trains a denoiser first; unset: the objective's default (0.4 for ect), "
        "0 with train.init_from",
    )
    huber_c: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="c of Eq. 4; unset: 0.19 sqrt(C H W) for chain, 0.00054 sqrt(C H W) for ict and ect, "
        "the paper's 0.00014 or 0.00015 for Algorithm 1",
    )
    chain: ChainConfig = ChainConfig()
    ict: ICTConfig = ICTConfig()
    ect: ECTConfig = ECTConfig()
    edm: EDMConfig = EDMConfig()
