"""The contract of an objective: the plan of each visit of a sample. `visit_loss` (loss.py) carries out any plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from udddm.config import ObjectiveConfig
from udddm.diffusion.schedule import NoiseSchedule

Ids = npt.NDArray[np.int64]
Condition = Literal["noise", "state", "none"]
"""What a visit gives the network as its conditioning image: noise of `condition_key`, the x0-state, or nothing."""


@dataclass
class Visits:
    """A batch of visits, made on the host by `Objective.plan`."""

    coefficients: torch.Tensor
    """[6, B]: the rows of `Coefficients`."""
    noise_key: torch.Tensor
    """[B] int64: eps is `rng.normal` of it."""
    condition_key: torch.Tensor
    """[B] int64: the conditioning image where it is noise; empty otherwise."""
    x0_weight: torch.Tensor
    """[B]: the weight of x_0 in the target, Eq. 3's 1/(n+1)."""
    weight: torch.Tensor
    """[B]: the weight of the loss."""
    huber_c: torch.Tensor
    """[B]: c of Eq. 4."""
    teacher_rows: torch.Tensor
    """[F] int64: the visits whose target the network evaluates now, because no state of their chain is stored yet."""
    teacher_coefficients: torch.Tensor
    """[6, F]: the level below, at which it is evaluated."""
    condition: Condition = "noise"

    def _map(self, name: str, **arguments: object) -> Visits:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "condition"}
        return replace(self, **{key: getattr(value, name)(**arguments) for key, value in tensors.items()})

    def pinned(self) -> Visits:
        """In page-locked memory."""
        return self._map("pin_memory")

    def to(self, device: torch.device) -> Visits:
        """On the device, without waiting for the copy."""
        return self._map("to", device=device, non_blocking=True)


class Objective(ABC):
    """What each visit of a sample trains.

    `default_pretrain` and `is_denoiser` are read from the factory, before the objective is created: from the class that
    `objective.name` names, or from a function that has such an attribute.
    """

    default_pretrain: ClassVar[float] = 0.0
    """Share of a run from random weights that trains a denoiser first, where `objective.pretrain` is not set."""
    is_denoiser: ClassVar[bool] = False
    """Whether it is the denoiser that other objectives begin with."""

    @abstractmethod
    def plan(self, ids: Ids, epoch: int) -> Visits:
        """The visits of samples `ids` [B] in `epoch`: a pure function of (seed, sample, epoch), on the host."""


@dataclass(frozen=True)
class ObjectiveContext:
    """What a factory of objectives is given: `factory(context)`, or `factory(context, settings)`."""

    schedule: NoiseSchedule
    config: ObjectiveConfig
    seed: int
    epochs: float
    """Length of its part of the run: what comes after pretraining. Its own epochs count from there."""
    shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    conditioned: bool
    """Whether the network takes a conditioning image."""

    @property
    def pixels(self) -> int:
        """Numbers of an image."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def condition(self) -> Condition:
        """Fresh noise for a network that takes an image, as in the first step of Algorithm 2: were it the state, the
        network would copy its target."""
        return "noise" if self.conditioned else "none"
