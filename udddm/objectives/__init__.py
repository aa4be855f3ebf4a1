"""Training objectives, selected by name (`objective.name`). An objective plans what each visit of a sample trains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import numpy as np

from udddm.config import RunConfig
from udddm.config.plugins import OBJECTIVES
from udddm.diffusion.schedule import NoiseSchedule
from udddm.errors import ConfigError
from udddm.objectives.base import Objective, ObjectiveContext, Visits, check_free_condition
from udddm.objectives.edm import EDM
from udddm.objectives.flips import HorizontalFlips
from udddm.objectives.guided import Guided, check_guided
from udddm.objectives.labels import LabelDropout
from udddm.objectives.loss import Teacher, adaptive_loss, pseudo_huber, visit_loss
from udddm.objectives.pretrain import Pretrained

__all__ = [
    "HorizontalFlips",
    "LabelDropout",
    "Objective",
    "ObjectiveContext",
    "Pretrained",
    "Teacher",
    "Visits",
    "adaptive_loss",
    "build",
    "describe",
    "pretrain_share",
    "pseudo_huber",
    "teacher_of",
    "visit_loss",
]


def build(config: RunConfig, schedule: NoiseSchedule, epochs: float, shape: tuple[int, int, int]) -> Objective:
    """The objective of a run of `epochs` epochs on images [C, H, W], including its pretraining. Raises ConfigError."""
    context = ObjectiveContext(schedule, config.objective, config.seed, epochs, shape, config.network.conditioned)
    first = math.ceil(pretrain_share(config) * epochs)
    if config.objective.pretrain_dropout is not None and not first:
        raise ConfigError(
            f"objective.pretrain_dropout={config.objective.pretrain_dropout:g}: this run pretrains no denoiser; set "
            "objective.pretrain, or objective.pretrain_dropout=null"
        )
    own = replace(context, epochs=max(epochs - first, 1e-9)) if first else context
    built: Objective = OBJECTIVES.build(config.objective.name, config.objective.settings, own)
    refined = config.objective.refined
    if built.refines and refined.share and refined.use == "condition" and not context.conditioned:
        raise ConfigError(
            "objective.refined.use=condition: the network takes no conditioning image; set network.condition=channels "
            "or cross-attention"
        )
    if config.data.condition.used:
        check_free_condition(built.plan(np.zeros(1, np.int64), 0))
    pretraining: Objective = EDM.create(context)
    if config.objective.guidance != 1:
        check_guided(config, built)
        built, pretraining = (Guided.of(each, config, context) for each in (built, pretraining))
    return Pretrained(pretraining, built, first) if first else built


def pretrain_share(config: RunConfig) -> float:
    """The fraction of the run that trains a denoiser before its objective. Raises ConfigError."""
    factory = OBJECTIVES.load(config.objective.name)
    if getattr(factory, "is_denoiser", Objective.is_denoiser):
        return 0.0
    if config.objective.pretrain is not None:
        return config.objective.pretrain
    default: float = getattr(factory, "default_pretrain", Objective.default_pretrain)
    return default if config.train.init_from is None else 0.0


def describe(config: RunConfig, objective: Objective) -> str:
    """The name of the objective and its pretraining, if any, for the first lines of a run's log."""
    share = pretrain_share(config) if isinstance(objective, Pretrained) else 0.0
    return (
        config.objective.name
        + _describe_refined(config, objective)
        + (f", guided with weight {config.objective.guidance:g}" if config.objective.guidance != 1 else "")
        + (f", after a denoiser for {share:.0%} of the run" if share else "")
    )


def _describe_refined(config: RunConfig, objective: Objective) -> str:
    refined = config.objective.refined
    if not refined.share:
        return ""
    if not objective.refines:
        return " (objective.refined is for ict and ect, and not used)"
    return f" with {refined.share:.0%} refined visits above sigma {refined.above:g}"


class ForwardCalls(Protocol):
    """What an engine needs of the calls of its network (`Engine`)."""

    @property
    def equal_forward_calls(self) -> bool: ...

    @property
    def static_shapes(self) -> bool: ...


def teacher_of(config: RunConfig, engine: ForwardCalls | None = None) -> Teacher:
    """How the network of a run is called for targets, with the run's engine or with one that needs nothing special."""
    static = config.train.compile or (engine is not None and engine.static_shapes)
    equal = engine is not None and engine.equal_forward_calls
    return Teacher(every_row=config.network.dropout > 0 or static, lockstep=equal)
