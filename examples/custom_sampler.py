"""A sampler that renoises to chosen levels: one evaluation at the highest level, then one per chosen level.

    PYTHONPATH=examples udddm-train --config digits --set 'sample={steps: 3, final: 100, \\
        sampler: custom_sampler:chosen_levels, settings: {levels: [2.0, 0.5]}}'
    PYTHONPATH=examples udddm-sample --checkpoint runs/digits --steps 3 --sampler custom_sampler:chosen_levels \\
        --sampler-settings '{levels: [2.0, 0.5]}'

A sampler draws noise from the task, so that an image depends only on its seed, not on the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field, field_validator

from udddm.config import Section
from udddm.config.plugins import takes_settings
from udddm.diffusion.denoise import add_noise
from udddm.diffusion.samplers import SamplingTask
from udddm.errors import ConfigError
from udddm.rng import Stream


class Settings(Section):
    """The section `sample.settings`, `--sampler-settings`, or `settings=` in Python."""

    levels: tuple[float, ...] = Field((2.0, 0.5), min_length=1)
    """Noise levels (sigma, in units of the data) to which the estimate is renoised."""
    fixed_noise: bool = True
    """Reuse the initial noise at all levels, like a deterministic solver, instead of fresh noise for each level."""

    @field_validator("levels")
    @classmethod
    def _falling(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if min(levels) <= 0 or list(levels) != sorted(levels, reverse=True):
            raise ValueError("give positive, decreasing levels, such as [2.0, 0.5]")
        return levels


@takes_settings(Settings)
def chosen_levels(task: SamplingTask, settings: Settings) -> torch.Tensor:
    """Images [B, C, H, W] from `task.steps` evaluations. The first `task.steps - 1` levels are used."""
    if task.steps > len(settings.levels) + 1:
        raise ConfigError(
            f"{task.steps} evaluations need {task.steps - 1} levels, and sample.settings.levels (--sampler-settings) "
            f"has {len(settings.levels)}"
        )
    _, _, estimate = task.first()
    start = task.draw(Stream.SAMPLE_NOISE)
    for number, sigma in enumerate(settings.levels[: task.steps - 1], start=1):
        at = task.at(float(task.schedule.time(np.array(sigma))))
        noise = start if settings.fixed_noise else task.draw(Stream.SAMPLE_RENOISE, number)
        condition = task.draw(Stream.SAMPLE_CONDITION, number)  # a network without a condition ignores it
        estimate = task.denoise(add_noise(estimate, noise, at), at, condition)
    return estimate
