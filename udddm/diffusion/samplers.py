"""Samplers: Algorithm 2 of the paper, renoising, and Heun's method. Every image is a function of its seed alone.

A sampler is a function `sampler(task)`, or `sampler(task, settings)`, from a `SamplingTask` to images. `sample` runs
one by name for a batch of seeds; `batches` does so for any number of seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from udddm import rng
from udddm.config.plugins import SAMPLERS
from udddm.diffusion.denoise import add_noise
from udddm.diffusion.denoise import denoise as denoise_once
from udddm.diffusion.schedule import Coefficients, NoiseSchedule
from udddm.rng import Stream


@dataclass(frozen=True)
class SamplingOptions:
    """How images are made from seeds."""

    steps: int = 1
    """Network evaluations per image."""
    sampler: str = "renoise"
    """renoise, algorithm-2, heun, or package.module:function."""
    guidance: float = 1.0
    """w of classifier-free guidance (Ho & Salimans 2022): every evaluation is f_none + w (f_label - f_none), with two
    calls of the network where w is not 1. Needs labels, and a network trained with label dropout."""
    batch: int = 250
    """Images per call of the network."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of a sampler of your own."""


@dataclass(frozen=True)
class SamplingTask:
    """What a sampler works with: a batch of B images."""

    schedule: NoiseSchedule
    steps: int
    """Network evaluations per image that the sampler may make."""
    count: int
    device: torch.device
    denoise: Callable[[torch.Tensor, Coefficients, torch.Tensor], torch.Tensor]
    """f(x_t, coefficients of t, conditioning image): the estimate of x_0, all [B, C, H, W]; one network evaluation."""
    draw: Callable[..., torch.Tensor]
    """`draw(stream, *parts)`: normal noise [B, C, H, W], a function of each image's seed, the stream and the parts."""

    def at(self, t: float) -> Coefficients:
        """The coefficients of time `t`, for every image of the batch."""
        rows = self.schedule.coefficients(np.full(self.count, t))
        return Coefficients(*torch.from_numpy(rows).to(self.device))

    def first(self) -> tuple[torch.Tensor, Coefficients, torch.Tensor]:
        """x_T, its coefficients, and the first estimate: what Algorithm 2 and renoising begin with."""
        at = self.at(self.schedule.last)
        xt = at.sigma[:, None, None, None] * self.draw(Stream.SAMPLE_NOISE)
        return xt, at, self.denoise(xt, at, self.draw(Stream.SAMPLE_CONDITION))


def algorithm_2(task: SamplingTask) -> torch.Tensor:
    """Algorithm 2 of the paper: x_T stays, and the estimate is fed back as the condition."""
    xt, at, estimate = task.first()
    for _ in range(task.steps - 1):
        estimate = task.denoise(xt, at, estimate)
    return estimate


def renoise(task: SamplingTask) -> torch.Tensor:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): the estimate is noised to falling levels and
    denoised again. Its first evaluation is that of Algorithm 2."""
    _, _, estimate = task.first()
    for step, t in enumerate(renoise_times(task.schedule, task.steps), start=1):
        at = task.at(t)
        xt = add_noise(estimate, task.draw(Stream.SAMPLE_RENOISE, step), at)
        estimate = task.denoise(xt, at, task.draw(Stream.SAMPLE_CONDITION, step))
    return estimate


def heun(task: SamplingTask) -> torch.Tensor:
    """The second-order solver of Karras et al. 2022 (Algorithm 1), for denoisers: `(steps + 1) // 2` steps, the last of
    first order, hence an odd number of evaluations.

    It follows the probability flow of x = x_t / alpha, dx/dsigma = (x - f) / sigma, from the highest level down to 0.
    """
    schedule, steps = task.schedule, (task.steps + 1) // 2
    rho = schedule.config.rho
    sigmas = np.linspace(schedule.highest ** (1 / rho), schedule.lowest ** (1 / rho), steps) ** rho
    condition = task.draw(Stream.SAMPLE_CONDITION)

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        at = task.at(float(schedule.time(np.array(sigma))))
        return (x - task.denoise(at.alpha[:, None, None, None] * x, at, condition)) / sigma

    x = float(sigmas[0]) * task.draw(Stream.SAMPLE_NOISE)
    for sigma, following in zip(sigmas.tolist(), [*sigmas[1:].tolist(), 0.0], strict=True):
        first = slope(x, sigma)
        moved = x + (following - sigma) * first
        x = moved if following == 0 else x + (following - sigma) * (first + slope(moved, following)) / 2
    return x


def renoise_times(schedule: NoiseSchedule, steps: int) -> list[float]:
    """The `steps - 1` falling times after T: the Karras spacing from sigma 0.8 (iCT's second step) downwards."""
    if steps == 1:
        return []
    rho = schedule.config.rho
    lowest = float(schedule.sigma(np.array(1.0))) ** (1 / rho)
    sigmas = np.linspace(0.8 ** (1 / rho), lowest, steps)[:-1] ** rho
    return [float(t) for t in schedule.time(sigmas)]


@torch.no_grad()
def sample(
    network: nn.Module,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    seeds: torch.Tensor,
    labels: torch.Tensor | None = None,
    options: SamplingOptions | None = None,
) -> torch.Tensor:
    """Images [B, C, H, W], float32 and not clamped, for `seeds` [B] int64, with `labels` [B] int64.

    Raises ConfigError for an unknown sampler, ValueError for fewer than one step or guidance without labels.
    """
    chosen = options or SamplingOptions()
    guidance = chosen.guidance
    if chosen.steps < 1:
        raise ValueError(f"steps must be at least 1, not {chosen.steps}")
    if guidance != 1 and labels is None:
        raise ValueError(f"guidance {guidance:g} needs labels to guide towards")

    def denoise(xt: torch.Tensor, at: Coefficients, condition: torch.Tensor) -> torch.Tensor:
        labelled = denoise_once(network, xt, at, condition, labels)
        if guidance == 1:
            return labelled
        none = denoise_once(network, xt, at, condition, None)
        return none + guidance * (labelled - none)

    host = seeds.cpu().numpy()

    def draw(stream: Stream, *parts: int) -> torch.Tensor:
        return rng.normal(rng.as_tensor(rng.keys(0, stream, host, *parts)).to(seeds.device), shape)

    task = SamplingTask(schedule, chosen.steps, len(seeds), seeds.device, denoise, draw)
    images: torch.Tensor = SAMPLERS.build(chosen.sampler, chosen.settings, task)
    return images


def batches(
    network: nn.Module,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    options: SamplingOptions | None = None,
    device: torch.device | None = None,
) -> Iterator[torch.Tensor]:
    """`sample` over many seeds, `options.batch` at a time, yielding [<= batch, C, H, W] on the host.

    The last batch is padded and cut, so that the network always sees the same shape and an image's rounding does not
    depend on how many others were asked for.
    """
    chosen = options or SamplingOptions()
    for start in range(0, len(seeds), chosen.batch):
        wanted = list(seeds[start : start + chosen.batch])
        padding = chosen.batch - len(wanted)

        def padded(some: list[int], padding: int = padding) -> torch.Tensor:
            return torch.tensor(some + some[:1] * padding, dtype=torch.int64, device=device or torch.device("cpu"))

        some_labels = None if labels is None else padded(list(labels[start : start + chosen.batch]))
        drawn = sample(network, schedule, shape, padded(wanted), some_labels, chosen)
        yield drawn[: len(wanted)].cpu()
