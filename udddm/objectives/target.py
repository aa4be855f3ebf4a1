"""Common code of chains, consistency training and denoisers: the target is x_0 or an estimate at a lower level.

These objectives only differ in their plans: the level that a visit trains, the weight of x_0 in its target
(`x0_weight`), whether the rest is the stored x0-state or an estimate evaluated now (`teacher_rows`), and the weight of
the loss.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from udddm import rng
from udddm.diffusion.schedule import NoiseSchedule
from udddm.objectives import special
from udddm.objectives.base import Ids, Objective, Visits
from udddm.rng import Stream

Floats = npt.NDArray[np.float64]


class TargetObjective(Objective):
    """Base class of objectives whose target is x_0 or an estimate at a lower level.

    `huber_c` is c of Eq. 4, and `conditioned` is whether the network takes a conditioning image. That image is new
    noise, as in the first step of Algorithm 2: conditioned on the state, the network would copy its target.
    """

    def __init__(self, schedule: NoiseSchedule, huber_c: float, seed: int, conditioned: bool):
        self.schedule, self.huber_c, self.seed, self.conditioned = schedule, huber_c, seed, conditioned

    def visits(
        self,
        ids: Ids,
        epoch: int,
        times: Floats,
        noise_key: rng.Keys,
        *,
        x0_weight: Floats,
        weight: Floats,
        teacher_rows: Ids,
        teacher_times: Floats,
    ) -> Visits:
        """The plan of visits at `times` [B]. Rows `teacher_rows` [F] have targets evaluated at `teacher_times` [F]."""
        return Visits(
            coefficients=torch.from_numpy(self.schedule.coefficients(times)),
            noise_key=rng.as_tensor(noise_key),
            condition_key=rng.as_tensor(rng.keys(self.seed, Stream.CONDITION, ids, epoch)),
            x0_weight=torch.from_numpy(x0_weight.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            huber_c=torch.full((len(ids),), self.huber_c),
            teacher_rows=torch.from_numpy(teacher_rows),
            teacher_coefficients=torch.from_numpy(self.schedule.coefficients(teacher_times)),
            condition="noise" if self.conditioned else "none",
        )

    def with_stored(self, visits: Visits, rows: Ids, times: Floats) -> Visits:
        """The plan with the visits `rows` [S] whose targets were stored at `times` [S]."""
        at = torch.from_numpy(self.schedule.coefficients(times))
        return replace(visits, stored_rows=torch.from_numpy(rows), stored_coefficients=at)


def lognormal(schedule: NoiseSchedule, key: rng.Keys, p_mean: float, p_std: float) -> Floats:
    """One sigma per key [B], with ln sigma ~ N(p_mean, p_std^2), clipped to the range of the schedule."""
    drawn: Floats = np.exp(p_mean + p_std * special.ndtri(rng.uniform(key)))
    return drawn.clip(schedule.lowest, schedule.highest)
