"""Guidance that is trained in, so that guided images take one call of the network per evaluation (docs/method.md).

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) replaces D_c, the mean of the images of class c given
x_t, by D_w = D_c + (w - 1) (D_c - D), where D is the mean of the images of all classes. Training replaces D_c by an
image x_0 of the class, whose mean it is, and D by the network's estimate without a label. The guided image of a visit
is therefore x_0 + (w - 1) (x_0 - D). It is the target of a denoiser. The teacher of a consistency objective, at level
r below sigma, is one step down the probability flow of D_w: its image is x_0 + (1 - r / sigma) (w - 1) (x_0 - D). This
is how MeanFlow is guided (Geng et al. 2025, arXiv 2505.13447, section 4.2).

D is a mean, and an estimate of a consistency model is not: it is the end of a trajectory, a sample. So visits without a
label train a denoiser in every objective.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

import torch

from udddm.config import RunConfig
from udddm.diffusion.schedule import Coefficients
from udddm.errors import ConfigError
from udddm.objectives.base import Ids, Objective, ObjectiveContext, Visits
from udddm.objectives.edm import SQUARED
from udddm.objectives.labels import LabelDropout


class Guided(Objective):
    """`objective` with guidance `weight` above 1 trained in. `sigma_data` is that of the schedule, `pixels` is C H W.

    A denoiser's visits with a label have their weight divided by w: with the squared distance, the gradient is then
    that of the target x_0 + (1 - 1 / w) (f - D), with f the output itself without gradient, which is model guidance
    (Tang et al. 2025, arXiv 2502.12154).
    """

    def __init__(self, objective: Objective, weight: float, dropout: LabelDropout, sigma_data: float, pixels: int):
        self.objective, self.weight, self.dropout = objective, weight, dropout
        self.sigma_data, self.pixels = sigma_data, pixels
        self.refines, self.reads_state = objective.refines, objective.reads_state

    @classmethod
    def of(cls, objective: Objective, config: RunConfig, context: ObjectiveContext) -> Self:
        """`objective` with the guidance of a run."""
        data = context.schedule.config.sigma_data
        return cls(objective, config.objective.guidance, LabelDropout.of(config), data, context.pixels)

    def phase(self, epoch: int) -> str:
        return self.objective.phase(epoch)

    def plan(self, ids: Ids, epoch: int) -> Visits:
        visits = self.objective.plan(ids, epoch)
        dropped = torch.from_numpy(self.dropout.drops(visits))
        step = torch.ones(len(ids))  # 1 - r / sigma, where r is 0 if the target is x_0
        level = _sigma(visits.coefficients)
        taught = visits.teacher_rows
        step[taught] -= _sigma(visits.teacher_coefficients) / level[taught]
        guidance = (self.weight - 1) * torch.stack([torch.ones(len(ids)), step]).masked_fill(dropped, 0.0)
        visits = replace(visits, guidance=guidance, no_label=self.dropout.none)
        if self.objective.is_denoiser:
            return replace(visits, weight=torch.where(dropped, visits.weight, visits.weight / self.weight))
        return self._denoising(visits, dropped, level)

    def _denoising(self, visits: Visits, dropped: torch.Tensor, level: torch.Tensor) -> Visits:
        """The plan in which the visits `dropped` [B], at noise `level` [B], train a denoiser.

        Their loss is weight ||f - x_0||^2 / (2 e), where e is the error that the best linear denoiser has if the images
        have the standard deviation sigma_data: about as large a gradient as that of the other visits of that level.
        """
        data = self.sigma_data
        error = math.sqrt(self.pixels) * level * data / (level.square() + data**2).sqrt()
        c = SQUARED * math.sqrt(self.pixels)
        kept = ~dropped[visits.teacher_rows]
        refined = visits.refined
        return replace(
            visits,
            x0_weight=visits.x0_weight.masked_fill(dropped, 1.0),
            weight=torch.where(dropped, visits.weight * c / error, visits.weight),
            huber_c=visits.huber_c.masked_fill(dropped, c),
            teacher_rows=visits.teacher_rows[kept],
            teacher_coefficients=visits.teacher_coefficients[:, kept],
            refined=refined and replace(refined, rows=refined.rows & ~dropped),
        )


def _sigma(coefficients: torch.Tensor) -> torch.Tensor:
    """The noise-to-signal ratio [B] of coefficients [6, B]."""
    at = Coefficients(*coefficients)
    return at.sigma / at.alpha


def check_guided(config: RunConfig, objective: Objective) -> None:
    """Raise ConfigError unless guidance can be trained into the `objective` of a run."""
    key, chosen = f"objective.guidance {config.objective.guidance:g}", config.objective
    if not objective.guides:
        raise ConfigError(
            f"{key}: objective.name={chosen.name} cannot be guided in training; choose ict, ect or edm, or set it to 1"
        )
    if objective.reads_state and not (objective.refines and chosen.refined.share):
        raise ConfigError(
            f"{key}: a stored target (objective.ect.length {chosen.ect.length}) is not guided; set "
            "objective.ect.length to 1, or objective.guidance to 1"
        )
    if objective.refines and chosen.refined.share and chosen.refined.use == "condition":
        raise ConfigError(
            f"{key}: without a label there is no estimate for objective.refined.use=condition; set it to image, or "
            "objective.guidance to 1"
        )
