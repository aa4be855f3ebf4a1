"""Samplers: Algorithm 2 of the paper, renoising, and Heun's method. Every image depends only on its seed.

A sampler is a function `sampler(task)`, or `sampler(task, settings)`, from a `SamplingTask` to images [B, C, H, W].
`sample` runs a sampler, selected by name, for one batch of seeds; `batches` runs it for any number of seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from udddm import rng
from udddm.config.plugins import SAMPLERS
from udddm.diffusion.denoise import add_noise
from udddm.diffusion.denoise import denoise as denoise_once
from udddm.diffusion.schedule import Coefficients, NoiseSchedule
from udddm.errors import ConfigError
from udddm.rng import Stream

MOST_AT_ONCE = 250
"""Images per call of the network, if `SamplingOptions.batch` is None."""


@dataclass(frozen=True)
class SamplingOptions:
    """How images are generated from seeds."""

    steps: int = 1
    """Network evaluations per image."""
    sampler: str = "renoise"
    """`renoise`, `algorithm-2`, `heun`, or `package.module:function`."""
    guidance: float = 1.0
    """The weight w of classifier-free guidance (Ho & Salimans 2022). Every evaluation is f_none + w (f_label - f_none),
    which takes two calls of the network if w is not 1. Requires labels and a network trained with label dropout."""
    batch: int | None = 250
    """Images per call of the network. The last call is padded to it, so that an image does not depend, not even by
    rounding, on how many are drawn. None: as many as there are, up to `MOST_AT_ONCE`, without padding."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings of a custom sampler."""


@dataclass(frozen=True)
class SamplingTask:
    """The input of a sampler, for a batch of B images."""

    schedule: NoiseSchedule
    steps: int
    """Network evaluations per image available to the sampler."""
    count: int
    """Images in the batch (B)."""
    device: torch.device
    denoise: Callable[[torch.Tensor, Coefficients, torch.Tensor], torch.Tensor]
    """f(x_t, coefficients of t, conditioning image): the estimate of x_0 by one network evaluation. The images are all
    [B, C, H, W]."""
    draw: Callable[..., torch.Tensor]
    """`draw(stream, *parts)`: normal noise [B, C, H, W] that depends only on each image's seed, the stream and the
    parts."""

    def at(self, t: float) -> Coefficients:
        """The coefficients of time `t`, repeated for every image of the batch."""
        rows = self.schedule.coefficients(np.full(self.count, t))
        return Coefficients(*torch.from_numpy(rows).to(self.device))

    def first(self) -> tuple[torch.Tensor, Coefficients, torch.Tensor]:
        """x_T, its coefficients, and the first estimate: the start of Algorithm 2 and of renoising."""
        at = self.at(self.schedule.last)
        xt = at.sigma[:, None, None, None] * self.draw(Stream.SAMPLE_NOISE)
        return xt, at, self.denoise(xt, at, self.draw(Stream.SAMPLE_CONDITION))


def algorithm_2(task: SamplingTask) -> torch.Tensor:
    """Algorithm 2 of the paper: x_T stays fixed, and each estimate is the condition of the next one."""
    xt, at, estimate = task.first()
    for _ in range(task.steps - 1):
        estimate = task.denoise(xt, at, estimate)
    return estimate


def renoise(task: SamplingTask) -> torch.Tensor:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1).

    Noise is added to the estimate at decreasing levels, and the result is denoised again. The first evaluation is that
    of Algorithm 2.
    """
    _, _, estimate = task.first()
    for step, t in enumerate(renoise_times(task.schedule, task.steps), start=1):
        at = task.at(t)
        xt = add_noise(estimate, task.draw(Stream.SAMPLE_RENOISE, step), at)
        estimate = task.denoise(xt, at, task.draw(Stream.SAMPLE_CONDITION, step))
    return estimate


def heun(task: SamplingTask) -> torch.Tensor:
    """The second-order solver of Karras et al. 2022 (Algorithm 1), for denoisers.

    It takes `(steps + 1) // 2` solver steps. The last one is of first order, so the number of evaluations is odd. The
    solver integrates the probability flow of x = x_t / alpha, dx/dsigma = (x - f) / sigma, from the highest level to 0.
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
    """The `steps - 1` decreasing times after T, with the spacing of Karras et al. 2022, Eq. 5.

    The first one has sigma = 0.8, as in the second step of iCT.
    """
    if steps == 1:
        return []
    rho = schedule.config.rho
    lowest = float(schedule.sigma(np.array(1.0))) ** (1 / rho)
    sigmas = np.linspace(0.8 ** (1 / rho), lowest, steps)[:-1] ** rho
    return [float(t) for t in schedule.time(sigmas)]


def check_evaluations(sampler: str, steps: int, key: str) -> None:
    """Raise ConfigError, which names `key`, for a number of evaluations that a sampler cannot use exactly."""
    if sampler == "heun" and steps % 2 == 0:
        raise ConfigError(
            f"{key} {steps}: heun takes an odd number of evaluations, two for each of its steps but the last: give "
            f"{steps - 1} or {steps + 1}"
        )


@torch.no_grad()
def sample(
    network: nn.Module,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    seeds: torch.Tensor,
    labels: torch.Tensor | None = None,
    options: SamplingOptions | None = None,
) -> torch.Tensor:
    """Generate images [B, C, H, W], float32 and not clamped, from `seeds` [B] int64 and `labels` [B] int64.

    Raises ConfigError for an unknown sampler, and ValueError for fewer than one step or for guidance without labels.
    """
    chosen = options or SamplingOptions()
    return run_sampler(task_of(network, schedule, shape, seeds, labels, chosen), chosen)


def run_sampler(task: SamplingTask, options: SamplingOptions) -> torch.Tensor:
    """The images [B, C, H, W] of the sampler that `options` name. Raises ConfigError for an unknown one."""
    images: torch.Tensor = SAMPLERS.build(options.sampler, options.settings, task)
    return images


def task_of(
    network: nn.Module,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    seeds: torch.Tensor,
    labels: torch.Tensor | None,
    options: SamplingOptions,
) -> SamplingTask:
    """The input of a sampler for `seeds` [B] int64 and `labels` [B] int64. Raises ValueError as `sample` does."""
    guidance = options.guidance
    if options.steps < 1:
        raise ValueError(f"steps must be at least 1, not {options.steps}")
    if guidance != 1 and labels is None:
        raise ValueError(f"guidance {guidance:g} needs labels: pass labels, or use guidance 1")

    def denoise(xt: torch.Tensor, at: Coefficients, condition: torch.Tensor) -> torch.Tensor:
        labeled = denoise_once(network, xt, at, condition, labels)
        if guidance == 1:
            return labeled
        none = denoise_once(network, xt, at, condition, None)
        return none + guidance * (labeled - none)

    host = seeds.cpu().numpy()

    conditioned = getattr(getattr(network, "config", None), "conditioned", True)

    def draw(stream: Stream, *parts: int) -> torch.Tensor:
        if stream == Stream.SAMPLE_CONDITION and not conditioned:  # nothing reads it
            return torch.zeros((), device=seeds.device).expand(len(host), *shape)
        return rng.normal(rng.as_tensor(rng.keys(0, stream, host, *parts)).to(seeds.device), shape)

    return SamplingTask(schedule, options.steps, len(seeds), seeds.device, denoise, draw)


def with_conditions(task: SamplingTask, images: torch.Tensor) -> SamplingTask:
    """The same task with the conditioning images `images` [B, C, H, W] instead of noise, at every evaluation."""

    def denoise(xt: torch.Tensor, at: Coefficients, condition: torch.Tensor) -> torch.Tensor:
        return task.denoise(xt, at, images.to(xt.device))

    return replace(task, denoise=denoise)


Draw = Callable[[SamplingTask, list[int]], torch.Tensor]
"""A function from a task and the positions of its B images among all to images [B, C, H, W]."""


@torch.no_grad()
def batches(
    network: nn.Module,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    options: SamplingOptions | None = None,
    device: torch.device | None = None,
    run: Draw | None = None,
) -> Iterator[torch.Tensor]:
    """Run `sample` on many seeds, `options.batch` at a time. Yields images [<= batch, C, H, W] on the host.

    With a batch size, the last batch is padded, and its result is cropped: the network always receives the same shape,
    so that the rounding of an image does not depend on the number of images requested. `run` draws the images of a
    batch; by default, the sampler does. Raises the errors of `sample`.
    """
    chosen = options or SamplingOptions()
    size = chosen.batch or MOST_AT_ONCE
    for start in range(0, len(seeds), size):
        wanted = min(size, len(seeds) - start)
        rows = list(range(start, start + wanted)) + [start] * (size - wanted if chosen.batch else 0)

        def padded(values: Sequence[int], rows: list[int] = rows) -> torch.Tensor:
            return torch.tensor([values[row] for row in rows], dtype=torch.int64, device=device or torch.device("cpu"))

        some_labels = None if labels is None else padded(labels)
        task = task_of(network, schedule, shape, padded(seeds), some_labels, chosen)
        drawn = run_sampler(task, chosen) if run is None else run(task, rows)
        yield drawn[:wanted].cpu()
