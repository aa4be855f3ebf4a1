"""The conditioning images of a run with `data.condition`, and those that are given to a trained model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from udddm import rng
from udddm.config.condition import ConditionConfig
from udddm.diffusion import known
from udddm.errors import ConfigError
from udddm.rng import Stream

HIDDEN = -2.0
"""The value of hidden pixels in a conditioning image, which no pixel has."""
_LARGEST = 0.5


@dataclass(frozen=True)
class ConditionImages:
    """Makes the conditioning images of `config` for images of `shape` (C, H, W). Each is [C, H, W] too.

    Raises ConfigError if the kind does not apply to this shape.
    """

    config: ConditionConfig
    shape: tuple[int, int, int]
    seed: int

    def __post_init__(self) -> None:
        if self.config.factor is not None:
            known.check_factor(self.config.factor, self.shape, "data.condition.factor")
        if self.config.kind == "gray" and self.shape[0] != 3:
            raise ConfigError(
                f"data.condition.kind=gray is for RGB images; the images of this data set have {self.shape[0]} "
                "channel(s): choose another kind, or none"
            )

    def split(self, stacked: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and their conditioning images, both [B, C, H, W], from what `ImageDataset.read` returns.

        That is [B, C, H, W], or [B, 2 C, H, W] for pairs. `keys` [B] int64 determine the hidden parts.
        """
        images, given = self.given(stacked, keys)
        return images, self.prepared(given)

    def given(self, stacked: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as `split`, with conditioning images as a user gives them: [B, *given_shape], NaN in hidden
        pixels."""
        images = stacked[:, : self.shape[0]].contiguous()
        if self.config.kind == "pairs":
            return images, stacked[:, self.shape[0] :].contiguous()
        if self.config.factor is not None:
            return images, known.block_means(images, self.config.factor)
        if self.config.kind == "gray":
            return images, known.luma(images)
        return images, torch.where(self._hidden(keys)[:, None], torch.nan, images)

    def _hidden(self, keys: torch.Tensor) -> torch.Tensor:
        """The hidden rectangles [B, H, W] of the visits with `keys` [B]."""
        drawn = keys.cpu().numpy()
        inside = []
        for axis, side in enumerate(self.shape[1:]):
            largest = max(1, round((self.config.largest or _LARGEST) * side))
            least = (largest + 1) // 2
            numbers = [rng.keys(self.seed, Stream.CONDITION_MASK, drawn, axis, which) for which in (0, 1)]
            length = least + rng.randint(largest - least + 1, numbers[0])
            first = rng.randint(side - length + 1, numbers[1])
            place = np.arange(side)
            inside.append((place >= first[:, None]) & (place < (first + length)[:, None]))
        return torch.from_numpy(inside[0][:, :, None] & inside[1][:, None, :])

    @property
    def given_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of what a user gives for each image."""
        channels, height, width = self.shape
        if self.config.factor is not None:
            return channels, height // self.config.factor, width // self.config.factor
        return (1 if self.config.kind == "gray" else channels), height, width

    def prepared(self, given: torch.Tensor) -> torch.Tensor:
        """The conditioning images [N, C, H, W] from those of a user, [N, *given_shape] in [-1, 1].

        In `mask`, hidden pixels are NaN.
        """
        if self.config.factor is not None:
            return known.enlarged(given, self.config.factor)
        if self.config.kind == "mask":
            return self.masked(given, given.isnan())
        return given.expand(-1, self.shape[0], -1, -1).contiguous()

    @property
    def hides(self) -> bool:
        """Whether a part of each conditioning image is hidden (`data.condition.kind=mask`)."""
        return self.config.kind == "mask"

    @staticmethod
    def masked(images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] as the network takes them, without the pixels that are true in `hidden` [N, 1 or C, H,
        W] bool."""
        return torch.where(hidden, HIDDEN, images)
