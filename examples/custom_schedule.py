"""The cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672), clipped to a lowest and a highest noise level.

    PYTHONPATH=examples udddm-train --config digits \\
        --set schedule.kind=custom_schedule:Cosine --set 'schedule.settings={lowest: 0.05, highest: 30}'

x_t = cos(a) x_0 + sin(a) eps, where the angle a rises linearly with t. sigma, the ratio of noise to signal, is tan(a).
The preconditioning is that of EDM, which `NoiseSchedule` provides for every schedule.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field, model_validator

from udddm.config import ScheduleConfig, Section
from udddm.diffusion.schedule import Array, NoiseSchedule


class Cosine(NoiseSchedule):
    """The cosine schedule, as a NoiseSchedule."""

    class Settings(Section):
        """The section `schedule.settings`."""

        lowest: float = Field(0.01, gt=0)
        highest: float = Field(80.0, gt=0)

        @model_validator(mode="after")
        def _rising(self) -> Cosine.Settings:
            if self.lowest >= self.highest:
                raise ValueError(f"lowest {self.lowest} must be below highest {self.highest}")
            return self

    def __init__(self, config: ScheduleConfig, settings: Settings):
        super().__init__(config)
        self.first_angle, self.last_angle = math.atan(settings.lowest), math.atan(settings.highest)

    def _angle(self, t: Array) -> Array:
        done = (np.asarray(t) - 1) / (self.last - 1)
        return self.first_angle + done * (self.last_angle - self.first_angle)

    def sigma(self, t: Array) -> Array:
        return np.tan(self._angle(t))

    def signal(self, t: Array) -> Array:
        return np.cos(self._angle(t))

    def time(self, sigma: Array) -> Array:
        done = (np.arctan(sigma) - self.first_angle) / (self.last_angle - self.first_angle)
        return (1 + done * (self.last - 1)).clip(1, self.last)
