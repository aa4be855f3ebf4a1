"""Algorithm 2 of the paper, and renoising. Every image is a function of its seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import nn

from udddm import rng
from udddm.diffusion.denoise import add_noise
from udddm.diffusion.denoise import denoise as denoise_once
from udddm.diffusion.schedule import Coefficients, NoiseSchedule
from udddm.rng import Stream

SamplerName = Literal["algorithm-2", "renoise", "heun"]


def _at(process: NoiseSchedule, t: float, count: int, device: torch.device) -> Coefficients:
    return Coefficients(*torch.from_numpy(process.coefficients(np.full(count, t))).to(device))


@torch.no_grad()
def sample(
    network: nn.Module,
    process: NoiseSchedule,
    shape: tuple[int, int, int],
    seeds: torch.Tensor,
    *,
    steps: int = 1,
    sampler: SamplerName = "renoise",
    labels: torch.Tensor | None = None,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Images [B, C, H, W], float32, for `seeds` [B] int64, by `steps` network evaluations each.

    `algorithm-2` keeps x_T and feeds the estimate back as the condition (the paper). `renoise` noises the estimate to
    falling levels and denoises again (multistep consistency sampling, Song et al. 2023, Algorithm 1); its first
    evaluation is the same. `heun` is for denoisers: `(steps + 1) // 2` steps of the second-order solver of Karras et
    al. 2022 (Algorithm 1), whose last is of first order: an odd number of evaluations. None clamps: callers do when
    they need [-1, 1].

    `guidance` w is classifier-free guidance (Ho & Salimans 2022): where w is not 1, every evaluation is f_none +
    w (f_label - f_none), two calls of the network. It needs `labels`, and a network trained with label dropout.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
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

    if sampler == "heun":
        return _heun(denoise, process, draw, len(seeds), seeds.device, (steps + 1) // 2)
    at = _at(process, process.last, len(seeds), seeds.device)
    xt = at.sigma[:, None, None, None] * draw(Stream.SAMPLE_NOISE)
    estimate = denoise(xt, at, draw(Stream.SAMPLE_CONDITION))
    if sampler == "algorithm-2":
        for _ in range(steps - 1):
            estimate = denoise(xt, at, estimate)
        return estimate
    for step, t in enumerate(renoise_times(process, steps), start=1):
        at = _at(process, t, len(seeds), seeds.device)
        xt = add_noise(estimate, draw(Stream.SAMPLE_RENOISE, step), at)
        estimate = denoise(xt, at, draw(Stream.SAMPLE_CONDITION, step))
    return estimate


def _heun(
    denoise: Callable[[torch.Tensor, Coefficients, torch.Tensor], torch.Tensor],
    process: NoiseSchedule,
    draw: Callable[..., torch.Tensor],
    count: int,
    device: torch.device,
    steps: int,
) -> torch.Tensor:
    """The probability flow of x = x_t / signal, dx/dsigma = (x - f) / sigma, from the highest level down to 0."""
    rho = process.config.rho
    sigmas = np.linspace(process.highest ** (1 / rho), process.lowest ** (1 / rho), steps) ** rho
    condition = draw(Stream.SAMPLE_CONDITION)

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        at = _at(process, float(process.time(np.array(sigma))), count, device)
        return (x - denoise(at.alpha[:, None, None, None] * x, at, condition)) / sigma

    x = float(sigmas[0]) * draw(Stream.SAMPLE_NOISE)
    for sigma, following in zip(sigmas.tolist(), [*sigmas[1:].tolist(), 0.0], strict=True):
        first = slope(x, sigma)
        moved = x + (following - sigma) * first
        x = moved if following == 0 else x + (following - sigma) * (first + slope(moved, following)) / 2
    return x


def renoise_times(process: NoiseSchedule, steps: int) -> list[float]:
    """The `steps - 1` falling times after T: the Karras spacing from sigma 0.8 (iCT's second step) downwards."""
    if steps == 1:
        return []
    rho = process.config.rho
    lowest = float(process.sigma(np.array(1.0))) ** (1 / rho)
    sigmas = np.linspace(0.8 ** (1 / rho), lowest, steps)[:-1] ** rho
    return [float(t) for t in process.time(sigmas)]


def batches(
    network: nn.Module,
    process: NoiseSchedule,
    shape: tuple[int, int, int],
    seeds: list[int],
    *,
    batch: int = 250,
    steps: int = 1,
    sampler: SamplerName = "renoise",
    labels: list[int] | None = None,
    guidance: float = 1.0,
    device: torch.device | None = None,
) -> Iterator[torch.Tensor]:
    """`sample` over many seeds, `batch` at a time, yielding [<= batch, C, H, W] on the host.

    The last batch is padded and cut, so that the network always sees the same shape and an image's rounding does not
    depend on how many others were asked for.
    """
    device = device or torch.device("cpu")
    for start in range(0, len(seeds), batch):
        wanted = seeds[start : start + batch]
        padding = batch - len(wanted)
        ids = torch.tensor(wanted + wanted[:1] * padding, dtype=torch.int64, device=device)
        chosen = None
        if labels is not None:
            some = labels[start : start + batch]
            chosen = torch.tensor(some + some[:1] * padding, dtype=torch.int64, device=device)
        drawn = sample(network, process, shape, ids, steps=steps, sampler=sampler, labels=chosen, guidance=guidance)
        yield drawn[: len(wanted)].cpu()
