"""The section `objective`: what a visit trains (docs/method.md)."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from udddm.config.base import Fraction, Positive, Section, UnderOne, unit
from udddm.config.plugins import OBJECTIVES


class Stage(Section):
    """A stage of the chain objective, with its own number of noise levels."""

    start: Fraction = Field(
        description="fraction of the run at which the stage starts", json_schema_extra=unit("fraction of the run")
    )
    levels: Annotated[int, Field(ge=1)] = Field(
        description="number of noise levels above the lowest, for chains that start in this stage",
        json_schema_extra=unit("noise levels"),
    )


class ChainConfig(Section):
    """The chain objective (docs/method.md): consistency training whose teacher is the x0-state store."""

    length: Positive | Literal["trajectory"] = Field(
        2,
        description="visits per chain: 1 is consistency training, 'trajectory' climbs all levels from the lowest",
        json_schema_extra=unit("visits"),
    )
    stages: tuple[Stage, ...] = Field(
        (Stage(start=0, levels=8), Stage(start=0.2, levels=16), Stage(start=0.5, levels=32)),
        min_length=1,
        description="stages with a growing number of levels M, each a multiple of the previous one",
    )
    distribution: Literal["uniform", "lognormal"] = Field(
        "uniform", description="distribution of the level at which a chain starts"
    )
    p_mean: float = Field(-1.1, description="mean of ln sigma, if lognormal", json_schema_extra=unit("ln sigma"))
    p_std: Annotated[float, Field(gt=0)] = Field(
        2.0, description="standard deviation of ln sigma, if lognormal", json_schema_extra=unit("ln sigma")
    )
    x0_weight: Literal["lowest", "visits"] = Field(
        "lowest",
        description="weight of x0 in the target: 1 at the lowest level only, or 1/(n+1) as in Eq. 3, n = level",
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
                raise ValueError("stages must be sorted by start")
            if after.levels % before.levels:
                raise ValueError(f"levels must nest: {after.levels} is not a multiple of {before.levels}")
        return stages


class ICTConfig(Section):
    """iCT (Song & Dhariwal 2023): consistency training without a store."""

    s0: Positive = Field(
        10,
        description="number of noise levels at the start; it doubles during the run",
        json_schema_extra=unit("noise levels"),
    )
    s1: Positive = Field(1280, description="number of noise levels at the end", json_schema_extra=unit("noise levels"))
    distribution: Literal["lognormal", "uniform"] = Field("lognormal", description="distribution of the noise level")
    p_mean: float = Field(-1.1, description="mean of ln sigma", json_schema_extra=unit("ln sigma"))
    p_std: Annotated[float, Field(gt=0)] = Field(
        2.0, description="standard deviation of ln sigma", json_schema_extra=unit("ln sigma")
    )
    weighting: Literal["none", "gap"] = Field(
        "gap", description="loss weight of a level: 1, or 1/(sigma_k - sigma_(k-1))"
    )

    @model_validator(mode="after")
    def _ordered(self) -> ICTConfig:
        if self.s1 < self.s0:
            raise ValueError(f"s1 ({self.s1}) must be at least s0 ({self.s0})")
        return self


class ECTConfig(Section):
    """Easy Consistency Tuning (Geng et al. 2024): r = sigma (1 - n(sigma)/q^a), n = 1 + k sigmoid(-b sigma)."""

    q: Annotated[float, Field(gt=1)] = Field(
        2.0, description="base of the gap between the two noise levels, r and sigma"
    )
    k: Annotated[float, Field(ge=0)] = Field(8.0, description="k of n(sigma)")
    b: Annotated[float, Field(ge=0)] = Field(1.0, description="b of n(sigma)")
    length: Positive = Field(
        1,
        description="visits per chain: 1 is ECT; if longer, all targets but the first are read from the store",
        json_schema_extra=unit("visits"),
    )
    stages: Positive = Field(
        8, description="number of stages of the run, in which a = 1, 2, ...", json_schema_extra=unit("stages")
    )
    weighting: Literal["gap", "snr"] = Field(
        "gap", description="loss weight of a visit: 1/(sigma - r), or 1/sigma^2 + 1/sigma_data^2, ECT's for ImageNet-64"
    )
    p_mean: float = Field(-1.1, description="mean of ln sigma", json_schema_extra=unit("ln sigma"))
    p_std: Annotated[float, Field(gt=0)] = Field(
        2.0, description="standard deviation of ln sigma", json_schema_extra=unit("ln sigma")
    )


class EDMConfig(Section):
    """The EDM denoiser (Karras et al. 2022), alone or as pretraining."""

    p_mean: float = Field(-1.2, description="mean of ln sigma", json_schema_extra=unit("ln sigma"))
    p_std: Annotated[float, Field(gt=0)] = Field(
        1.2, description="standard deviation of ln sigma", json_schema_extra=unit("ln sigma")
    )


class RefinedConfig(Section):
    """Refined visits, of ict and ect: the stored estimate is their image or their condition (docs/method.md)."""

    share: UnderOne = Field(
        0.0,
        description="share of the visits at levels above `above` that are refined; 0 is off",
        json_schema_extra=unit("fraction of the visits"),
    )
    use: Literal["image", "condition"] = Field(
        "image",
        description="use of the stored estimate at a refined visit: as the image instead of x_0 (refined pairs), or as "
        "the conditioning image (Algorithm 2)",
    )
    above: Annotated[float, Field(ge=0)] = Field(
        0.8, description="sigma above which visits are refined", json_schema_extra=unit("noise level")
    )
    length: Annotated[int, Field(ge=2)] = Field(
        2,
        description="visits of a chain, all with one noise and level; each but the first is refined",
        json_schema_extra=unit("visits"),
    )
    start: Fraction = Field(
        0.0,
        description="fraction of the run, after its pretraining, at which refinement starts",
        json_schema_extra=unit("fraction of the run"),
    )
    min_sharpness: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="estimates whose sum of squared differences of neighboring pixels is below this fraction of that "
        "of the image are not used",
    )
    source: Literal["store", "network"] = Field(
        "store", description="where estimates come from: the x0-state, or one more evaluation per step"
    )

    @model_validator(mode="after")
    def _possible(self) -> RefinedConfig:
        most = (self.length - 1) / self.length
        if self.source == "store" and self.share > most:
            raise ValueError(
                f"share {self.share} needs longer chains: with length {self.length} at most {most:.3g} of the visits "
                "have an earlier estimate"
            )
        return self


class ObjectiveConfig(Section):
    """The training objective, and the settings of each built-in one."""

    name: Annotated[str, AfterValidator(OBJECTIVES.check)] = Field(
        "chain",
        description="chain, ict, ect, edm (a denoiser), uddm (the paper's Algorithm 1), or package.module:factory",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a custom objective")
    pretrain: UnderOne | None = Field(
        None,
        description="fraction of the run that pretrains a denoiser; unset: the objective's default (0.4 for ect), or 0 "
        "with train.init_from",
        json_schema_extra=unit("fraction of the run"),
    )
    pretrain_dropout: UnderOne | None = Field(
        None, description="dropout probability while pretraining; unset: `network.dropout`, as for the objective"
    )
    huber_c: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="c of the pseudo-Huber loss, Eq. 4; 0: the distance ||x - y||, as in ECT; unset: 0.19 "
        "sqrt(C H W) for chain, 0.00054 sqrt(C H W) for ict and ect, the paper's 0.00014 or 0.00015 for Algorithm 1",
    )
    guidance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0,
        description="guidance weight w that is trained into the model, which then samples guided images with one call "
        "of the network per evaluation; 1 disables it (docs/method.md)",
    )
    chain: ChainConfig = Field(ChainConfig(), description="settings of chain")
    ict: ICTConfig = Field(ICTConfig(), description="settings of ict")
    ect: ECTConfig = Field(ECTConfig(), description="settings of ect")
    edm: EDMConfig = Field(EDMConfig(), description="settings of edm, also as pretraining")
    refined: RefinedConfig = Field(RefinedConfig(), description="refined visits, of ict and ect")
