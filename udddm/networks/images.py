"""The images of a network: checks, padding to a multiple of its patches or stages, and the conditioning image."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from udddm.config import NetworkConfig


class ImageInputs:
    """Checks the images of a network for `shape` (C, H, W), pads them, and crops its output.

    Height and width are padded to multiples of `multiple`, by replicating the edges. `size` is the padded (height,
    width), and `channels` the number of channels that `stack` returns.

    Raises ValueError if the shape is not three positive numbers.
    """

    def __init__(self, config: NetworkConfig, shape: tuple[int, int, int], multiple: int):
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"an image's shape must be (channels, height, width), all at least 1, not {tuple(shape)}")
        self.config, self.shape = config, (shape[0], shape[1], shape[2])
        channels, height, width = self.shape
        down, across = -height % multiple, -width % multiple
        self.size = (height + down, width + across)
        self.channels = channels * (2 if config.condition == "channels" else 1)
        self._padding = (across // 2, across - across // 2, down // 2, down - down // 2)

    @property
    def padded(self) -> bool:
        """Whether images are padded."""
        return any(self._padding)

    def check(self, x: torch.Tensor, condition: torch.Tensor | None) -> None:
        """Raises ValueError if an image has another shape, or if a condition that the network needs is missing."""
        self._check_shape(x, "x")
        if not self.config.conditioned:
            return
        if condition is None:
            raise ValueError(
                f"this network takes a conditioning image (network.condition={self.config.condition}), but none was "
                "given: pass one, or set network.condition=none"
            )
        self._check_shape(condition, "condition")
        count, given = x.shape[0], condition.shape[0]  # len() would make the number of images a constant of an export
        if given != count:
            raise ValueError(f"there are {count} images, but {given} conditioning images: pass one per image")

    def stack(self, x: torch.Tensor, condition: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Padded images [B, channels, *size] of type `dtype`, with the condition if it is additional channels."""
        x = self.pad(x, dtype)
        if self.config.condition != "channels":
            return x
        assert condition is not None
        return torch.cat([x, self.pad(condition, dtype)], dim=1)

    def pad(self, image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, *size] of type `dtype`, for a network cast with `module.to`."""
        image = image.to(dtype)
        return F.pad(image, self._padding, mode="replicate") if self.padded else image

    def crop(self, image: torch.Tensor) -> torch.Tensor:
        """[B, C, *size] -> [B, C, H, W]."""
        left, _, top, _ = self._padding
        _, height, width = self.shape
        return image[:, :, top : top + height, left : left + width]

    def _check_shape(self, image: torch.Tensor, name: str) -> None:
        if image.shape[1:] != self.shape:
            raise ValueError(f"{name} is {list(image.shape)}, but the network was built for [B, *{list(self.shape)}]")


def attended_stages(config: NetworkConfig, images: ImageInputs, sides: list[int]) -> set[int]:
    """The stages with self-attention: those whose side is in `config.attention_resolutions`.

    `sides` are the heights of the stages. Raises ValueError for a resolution that no stage has; the default resolutions
    apply where there are such stages.
    """
    missing = sorted(set(config.attention_resolutions) - set(sides))
    default = config.attention_resolutions == NetworkConfig.model_fields["attention_resolutions"].default
    if missing and not default:
        _, height, width = images.shape
        padded = f", padded to {sides[0]}x{images.size[1] // config.patch}" if images.padded else ""
        raise ValueError(
            f"network.attention_resolutions: no stage has side {', '.join(map(str, missing))}; images of "
            f"{height}x{width} pixels{padded} give {len(sides)} stages with sides {', '.join(map(str, sides))}"
        )
    return {stage for stage, side in enumerate(sides) if side in config.attention_resolutions}
