"""The contract of an objective: it plans every visit of a sample. `visit_loss` (loss.py) carries out any plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from udddm.config import ObjectiveConfig
from udddm.diffusion.schedule import NoiseSchedule
from udddm.errors import ConfigError
from udddm.objectives.refined import Refined
from udddm.objectives.transfer import map_tensors

Ids = npt.NDArray[np.int64]
Condition = Literal["noise", "state", "data", "none"]
"""The conditioning image of a visit: noise generated from `condition_key`, the x0-state, one from the data set
(`Visits.condition_images`), or none. A plan never has "data", which `Visits.conditioned_on` sets."""


@dataclass
class Visits:
    """A plan for a batch of B visits, created on the host by `Objective.plan`."""

    coefficients: torch.Tensor
    """[6, B] float32: the fields of `Coefficients`."""
    noise_key: torch.Tensor
    """[B] int64: the keys from which `rng.normal` generates eps."""
    condition_key: torch.Tensor
    """[B] int64: the keys of the conditioning images if `condition` is "noise"; otherwise unused, and may be empty."""
    x0_weight: torch.Tensor
    """[B]: the weight of x_0 in the target, which is 1/(n+1) in Eq. 3."""
    weight: torch.Tensor
    """[B]: the weights of the losses."""
    huber_c: torch.Tensor
    """[B]: c of Eq. 4."""
    teacher_rows: torch.Tensor
    """[F] int64: the visits whose targets the network evaluates now, because no state of their chain is stored yet."""
    teacher_coefficients: torch.Tensor
    """[6, F] float32: the coefficients of the level below, at which these targets are evaluated."""
    condition: Condition = "noise"
    stored_rows: torch.Tensor | None = None
    """[S] int64: the visits whose target is the x0-state, or None for objectives without such targets."""
    stored_coefficients: torch.Tensor | None = None
    """[6, S] float32: the coefficients of the level at which these targets were stored."""
    refined: Refined | None = None
    """The visits that may use an estimate as their image or their condition, if any."""
    condition_images: torch.Tensor | None = None
    """[B, C, H, W] float32: the conditioning images if `condition` is "data"."""
    guidance: torch.Tensor | None = None
    """[2, B] float32: the factors of x_0 - D that are added to x_0 as the target and to the image of the teacher, where
    D is the estimate without a label (guided.py). None if guidance is not trained in."""
    no_label: int = 0
    """The label that means "no label", for `guidance`."""

    def conditioned_on(self, images: torch.Tensor) -> Visits:
        """The same plan with the conditioning images `images` [B, C, H, W] from the data set instead of noise.

        Raises ConfigError if the plan uses the conditioning image for something else.
        """
        check_free_condition(self)
        return replace(self, condition="data", condition_images=images)

    def to(self, device: torch.device) -> Visits:
        """A copy on the device. Does not wait for the transfer."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def check_free_condition(visits: Visits) -> None:
    """Raise ConfigError unless the conditioning image of a plan may come from the data set."""
    refines = visits.refined is not None and visits.refined.use == "condition"
    if visits.condition != "noise" or refines:
        what = "an estimate (objective.refined.use=condition)" if refines else f"the {visits.condition}"
        raise ConfigError(
            f"data.condition: the objective conditions the network on {what.replace('the state', 'the x0-state')}, and "
            "a network has only one conditioning image: choose another objective, such as ect, or set "
            "data.condition.kind=none"
        )


class Objective(ABC):
    """Plans what each visit of a sample trains.

    `default_pretrain` and `is_denoiser` are read from the factory before the objective is created: the factory is the
    class that `objective.name` refers to, or a function, which may have these attributes.
    """

    default_pretrain: ClassVar[float] = 0.0
    """Fraction of a run from random weights that first trains a denoiser, if `objective.pretrain` is not set."""
    is_denoiser: ClassVar[bool] = False
    """Whether this objective is a denoiser, which is never pretrained with another one."""
    refines: bool = False
    """Whether this objective follows `objective.refined`."""
    guides: ClassVar[bool] = False
    """Whether `objective.guidance` can be trained in: no target is stored, and targets are either x_0 (`x0_weight` 1)
    or evaluated at a lower level (0)."""
    reads_state: bool = True
    """Whether any visit depends on the x0-state. If not, the run keeps none."""

    @abstractmethod
    def plan(self, ids: Ids, epoch: int) -> Visits:
        """Plan the visits of samples `ids` [B] in `epoch`, on the host: a pure function of (seed, sample, epoch)."""

    def pretrains(self, epoch: int) -> bool:
        """Whether `epoch` belongs to the pretraining of a denoiser (`objective.pretrain`)."""
        return False

    def phase(self, epoch: int) -> str:
        """What is trained in `epoch`, such as "iCT with 20 noise levels". A run logs where it changes."""
        return ""


SMALLEST_C = 1e-12
"""Its square is not 0 in float32."""


@dataclass(frozen=True)
class ObjectiveContext:
    """The argument of an objective factory, called as `factory(context)` or `factory(context, settings)`."""

    schedule: NoiseSchedule
    config: ObjectiveConfig
    seed: int
    epochs: float
    """Number of epochs of this objective's part of the run, which follows pretraining. Epochs count from its start."""
    shape: tuple[int, int, int]
    """The shape (C, H, W) of an image."""
    conditioned: bool
    """Whether the network takes a conditioning image."""

    @property
    def pixels(self) -> int:
        """The number of values of an image, C H W."""
        channels, height, width = self.shape
        return channels * height * width

    def huber_c(self, default: float) -> float:
        """c of Eq. 4: `objective.huber_c`, or `default` if it is not set.

        0 becomes `SMALLEST_C`, at which Eq. 4 is ||x - y|| to float32, with a gradient of 0 instead of NaN where x = y.
        """
        given = self.config.huber_c
        return default if given is None else max(given, SMALLEST_C)

    @property
    def condition(self) -> Condition:
        """New noise if the network takes a conditioning image, as in the first step of Algorithm 2.

        Conditioned on the state, the network would copy its target.
        """
        return "noise" if self.conditioned else "none"
