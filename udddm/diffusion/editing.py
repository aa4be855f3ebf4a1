"""Zero-shot editing with consistency models (Song et al. 2023, arXiv 2303.01469, Algorithm 4), and interpolation.

A model that was trained without any condition fills in what an image lacks. `edit` alternates between adding noise,
denoising with one evaluation, and restoring what is known of the image. The paper writes the last part as
A^-1[(A y) (1 - Omega) + (A x) Omega] with an orthogonal A and a mask Omega; each `Edit` here computes the same
projection directly. Estimates are also kept within [-1, 1], so that what is known stays exact in the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from udddm.diffusion import known
from udddm.diffusion.denoise import add_noise
from udddm.diffusion.samplers import SamplingTask
from udddm.diffusion.schedule import NoiseSchedule
from udddm.errors import ConfigError
from udddm.rng import Stream

STEPS = 40
"""Network evaluations by default, as in the paper's code."""
Shape = tuple[int, int, int]


class Edit(ABC):
    """What is known of an image, and how the rest is generated."""

    name: ClassVar[str]
    """The value of `udddm sample --edit`."""
    sigma: float | None = None
    """The noise level at which generation starts. None: the highest one of the schedule."""

    @abstractmethod
    def check(self, shape: Shape) -> None:
        """Raise ConfigError unless this edit applies to images of `shape` (C, H, W)."""

    def input_shape(self, shape: Shape) -> Shape:
        """The shape (C, H, W) of the image that is given, for a model of images of `shape`."""
        return shape

    @abstractmethod
    def start(self, given: torch.Tensor) -> torch.Tensor:
        """The image to which the first noise is added, [B, C, H, W], from those given, in [-1, 1]."""

    @abstractmethod
    def restore(self, estimate: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The nearest image to `estimate` [B, C, H, W] that has what is known of `given`."""


@dataclass(frozen=True)
class Inpaint(Edit):
    """Generate the pixels in `mask` [H, W] (True), and keep all others as they are."""

    mask: torch.Tensor
    name: ClassVar[str] = "inpaint"

    def check(self, shape: Shape) -> None:
        if self.mask.dtype != torch.bool or self.mask.shape != shape[1:]:
            found = f"{'x'.join(map(str, self.mask.shape))} {self.mask.dtype}"
            raise ConfigError(f"mask: give bool [{shape[1]}, {shape[2]}], the size of the model's images, not {found}")
        if not self.mask.any():
            raise ConfigError("mask: it marks no pixel to generate")

    def start(self, given: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask.to(given.device), 0, given)

    def restore(self, estimate: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask.to(given.device), estimate.clamp(-1, 1), given)


@dataclass(frozen=True)
class Upscale(Edit):
    """Generate images whose means of `factor` x `factor` pixels are the pixels of the given image."""

    factor: int
    name: ClassVar[str] = "upscale"

    def check(self, shape: Shape) -> None:
        known.check_factor(self.factor, shape, "factor")

    def input_shape(self, shape: Shape) -> Shape:
        return shape[0], shape[1] // self.factor, shape[2] // self.factor

    def start(self, given: torch.Tensor) -> torch.Tensor:
        return known.enlarged(given, self.factor)

    def restore(self, estimate: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        size, (count, channels, height, width) = self.factor, given.shape
        tiled = (count, channels, height, size, width, size)
        blocks = estimate.reshape(tiled).transpose(3, 4)  # [B, C, h, w, factor, factor]
        fitted = known.with_mean(blocks.flatten(4), torch.full((size * size,), 1 / size**2), given)
        return fitted.reshape(blocks.shape).transpose(3, 4).reshape(estimate.shape)


@dataclass(frozen=True)
class Colorize(Edit):
    """Generate RGB images whose luma is the given gray image."""

    name: ClassVar[str] = "colorize"

    def check(self, shape: Shape) -> None:
        if shape[0] != 3:
            raise ConfigError(f"colorize needs a model of RGB images; this model's images have {shape[0]} channel(s)")

    def input_shape(self, shape: Shape) -> Shape:
        return 1, *shape[1:]

    def start(self, given: torch.Tensor) -> torch.Tensor:
        return given.expand(-1, 3, -1, -1)

    def restore(self, estimate: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return known.with_mean(estimate.movedim(1, 3), torch.tensor(known.LUMA), given[:, 0]).movedim(3, 1)


@dataclass(frozen=True)
class Stroke(Edit):
    """Generate images from a painting, of which noise of level `sigma` leaves the coarse structure (SDEdit, Meng et
    al. 2022, arXiv 2108.01073). Nothing of it is kept exactly. The paper starts at 5.38 on images of 256x256."""

    sigma: float = 2.0
    name: ClassVar[str] = "stroke"

    def check(self, shape: Shape) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ConfigError(f"sigma {self.sigma:g}: give a positive noise level, such as 2")

    def start(self, given: torch.Tensor) -> torch.Tensor:
        return given

    def restore(self, estimate: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return estimate.clamp(-1, 1)


def times(schedule: NoiseSchedule, steps: int, sigma: float | None) -> list[float]:
    """Decreasing times from noise level `sigma`, or from the last time T if it is None, to the lowest level.

    They are spaced as in Karras et al. 2022 (Eq. 5) with rho = 7, as in the paper's code. Only the first is given for
    one step.
    """
    highest = schedule.highest if sigma is None else sigma
    rungs = torch.linspace(highest ** (1 / 7), schedule.lowest ** (1 / 7), steps, dtype=torch.float64).numpy()
    found = [float(t) for t in schedule.time(rungs**7)]
    return found if sigma is not None else [schedule.last, *found[1:]]


def edit(task: SamplingTask, given: torch.Tensor, kind: Edit) -> torch.Tensor:
    """Algorithm 4 of Song et al. 2023: images [B, C, H, W] in [-1, 1] from those given, with `task.steps` evaluations.

    `given` is [B, *kind.input_shape], in [-1, 1]. Noise is a function of each image's seed; that of the first
    evaluation is the noise of `renoise`.
    """
    image = kind.start(given)
    for step, t in enumerate(times(task.schedule, task.steps, kind.sigma)):
        at = task.at(t)
        if step == 0:
            eps, condition = task.draw(Stream.SAMPLE_NOISE), task.draw(Stream.SAMPLE_CONDITION)
        else:
            eps, condition = task.draw(Stream.SAMPLE_RENOISE, step), task.draw(Stream.SAMPLE_CONDITION, step)
        image = kind.restore(task.denoise(add_noise(image, eps, at), at, condition), given)
    return image


def slerp(first: torch.Tensor, second: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985) of normal noise [B, ...] at `fraction` [B] in [0, 1].

    Noise stays on the sphere where almost all of it lies, unlike with linear interpolation. Fractions 0 and 1 give
    `first` and `second` to the last bit.
    """
    a, b = first.double().flatten(1), second.double().flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-30)  # 0 where a network reads no condition
    angle = cosine.clamp(-1, 1).acos()[:, None]
    share = fraction.to(a.device, torch.float64)[:, None]
    sine = angle.sin()
    near = sine < 1e-6
    safe = torch.where(near, 1, sine)
    before = torch.where(near, 1 - share, ((1 - share) * angle).sin() / safe)
    after = torch.where(near, share, (share * angle).sin() / safe)
    return (before * a + after * b).to(first.dtype).reshape(first.shape)
