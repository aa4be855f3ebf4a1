"""Refined visits: the stored estimate replaces x_0 as the image, or is the conditioning image (docs/method.md).

A refined visit repeats the noise and the level of the sample's previous visit. Its image b is the estimate stored
there, so it trains f(b + sigma eps, sigma) towards f(b + r eps, r). This is the refinement of the paper (arXiv
2405.21059), x^(n+1) = f(x^(n), x_t, t), fed back through the image and not through a condition, which the network
would copy. With `source: network`, which evaluates the network once more and needs no store, it is the coupling of
Issenhuth et al. (2024, arXiv 2406.09570).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from udddm import rng
from udddm.rng import Stream

_PROBE = 16
"""Leading values of a state that are compared with generation 0."""
_PROBE_TOLERANCE = 0.02
"""Above the rounding of every encoding of a state."""


@dataclass
class Refined:
    """The visits of a batch of B that may use an estimate as their image or their condition."""

    rows: torch.Tensor
    """[B] bool: visits with the noise and the level at which the sample's x0-state was stored."""
    initial: torch.Tensor
    """[B, 16] float32: the first values of the generation 0 of samples in `rows` (`initial_values`). Nothing is refined
    from it, because it is noise."""
    min_sharpness: float = 0.0
    """The least sharpness of an estimate relative to that of its image (`sharpness`)."""
    source: Literal["store", "network"] = "store"
    """Where estimates come from: the x0-state, or an evaluation without gradient before the loss."""
    use: Literal["image", "condition"] = "image"
    """What an estimate is used for: as the image of the visit, instead of x_0, or as its conditioning image."""
    some: bool = True
    """Whether `rows` has any visits. This is known on the host, so that a batch without them does no work."""
    final: bool = False
    """Whether `rows` are the visits that use an estimate (`decided`), and not those that may."""

    def used(self, x0: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """A mask [B] of the visits that use the estimate. `x0` and `state` are [B, C, H, W]."""
        if self.source == "network" or self.final or not self.some:
            return self.rows
        used = self.rows & ~is_generation_zero(state, self.initial)
        if self.min_sharpness:
            used &= sharpness(state) >= self.min_sharpness * sharpness(x0)
        return used

    def decided(self, x0: torch.Tensor, state: torch.Tensor) -> Refined:
        """The same with `rows` that are final: those `used`. `x0` and `state` are [B, C, H, W]."""
        return replace(self, rows=self.used(x0, state), final=True)

    def inputs(
        self, used: torch.Tensor, x0: torch.Tensor, condition: torch.Tensor | None, estimate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images and conditioning images of the visits, all [B, C, H, W].

        Rows `used` [B], a mask, have `estimate` in the place of one of them; the others have `x0` and `condition`.
        """
        if not self.some:
            return x0, condition
        used = used[:, None, None, None]
        if self.use == "image":
            return torch.where(used, estimate, x0), condition
        assert condition is not None
        return x0, torch.where(used, estimate, condition)


def initial_values(seed: int, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.bool_]) -> torch.Tensor:
    """The first values of the generation 0 of the samples `ids` [B] in `rows` [B], and 0 for the others: [B, 16].

    `rng.normal` generates equal first values for any number of values, so these are those of any image.
    """
    values = np.zeros((len(ids), _PROBE), np.float32)
    if rows.any():
        keys = rng.as_tensor(rng.keys(seed, Stream.INITIAL_STATE, ids[rows]))
        values[rows] = rng.normal(keys, (2 * _PROBE,))[:, :_PROBE].numpy()
    return torch.from_numpy(values)


def is_generation_zero(state: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Whether each row of `state` [B, C, H, W] is generation 0, which begins with `initial` [B, 16]. Returns [B] bool.

    A run reads generation 0 in its first epoch, and later for samples that were reset because their chunk was corrupt.
    The first values of a row determine this.
    """
    flat = state.flatten(1)
    count = min(_PROBE, (flat.shape[1] + 1) // 2)
    values, noise = flat[:, :count], initial[:, :count]
    near = (values - noise).abs() <= _PROBE_TOLERANCE * noise.abs().clamp(min=1)
    clamped = (values - noise.clamp(-1, 1)).abs() <= _PROBE_TOLERANCE  # in uint8
    return (near | clamped).all(1)


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """The sum of squared differences of neighboring pixels of `images` [B, C, H, W]: [B]. It is low if blurred."""
    rows, columns = images.diff(dim=2), images.diff(dim=3)
    return rows.square().flatten(1).sum(1) + columns.square().flatten(1).sum(1)
