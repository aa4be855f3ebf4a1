"""DDPM++, the U-Net of Song et al. 2021 (arXiv 2011.13456) in the form of EDM (Karras et al. 2022, arXiv 2206.00364).

Appendix F.1 and Table 7 of the EDM paper describe its CIFAR-10 configuration: three stages of 256 channels with four
blocks each, attention with one head at 16x16. It differs from the ADM U-Net of `unet.py` in these respects: the noise
level is added to the features instead of scaling and shifting them, sums of a block and its input are divided by
sqrt(2), attention has biases and one head, the decoder attends in the last block of a stage only, and labels enter
before the MLP of the noise level, one-hot. Settings turn three differences to DDPM (Ho et al. 2020, arXiv 2006.11239)
back, so that its networks can be expressed too.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from udddm.config import Section
from udddm.errors import ConfigError
from udddm.networks.base import NetworkContext, refuse_unused
from udddm.networks.blocks import (
    Module,
    Resample,
    attend,
    group_norm,
    noise_angles,
    resampled,
    to_image,
    to_tokens,
)
from udddm.networks.images import ImageInputs, attended_stages

_EPS = 1e-6
_NEARLY_ZERO = 1e-5
"""The gain of layers that end a branch, which starts nearly as the identity."""
USED = ("base_channels", "channel_mult", "blocks_per_level", "attention_resolutions")
"""The keys of the section `network` that apply to this network, in addition to the common ones."""


class DDPMppSettings(Section):
    """The section `network.settings` of `network.name=ddpmpp`. The defaults are DDPM++, and the others DDPM."""

    resampling: Literal["residual", "convolution"] = Field(
        "residual",
        description="what changes the size between levels: a residual block (DDPM++), or a convolution (DDPM)",
    )
    rescale: bool = Field(
        True, description="divide the sum of a branch and its input by sqrt(2) (DDPM++), or leave it (DDPM: false)"
    )
    decoder_attention: Literal["last", "all"] = Field(
        "last", description="blocks of a level of the decoder with attention: the last (DDPM++ of EDM), or all (DDPM)"
    )

    @property
    def residual_scale(self) -> float:
        """The factor of the sum of a branch and its input; sqrt(0.5) keeps its variance."""
        return math.sqrt(0.5) if self.rescale else 1.0


def xavier(module: Module, gain: float = 1.0) -> Module:
    """Initialize a layer with Xavier-uniform weights times `gain` and biases of 0. Returns `module`."""
    nn.init.xavier_uniform_(module.weight, gain)  # type: ignore[arg-type]
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return module


class Attention(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]: self-attention with one head, added to its input, times `scale`."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = scale
        self.norm = group_norm(channels, _EPS)
        self.query_key_value = xavier(nn.Linear(channels, 3 * channels), math.sqrt(0.2))
        self.out = xavier(nn.Linear(channels, channels), _NEARLY_ZERO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = self.query_key_value(to_tokens(self.norm(x)))
        query, key, value = projected.unflatten(2, (3, 1, -1)).unbind(2)
        return (x + to_image(self.out(attend(query, key, value)), x.shape[2])) * self.scale


class Block(nn.Module):
    """[B, in_channels, H, W] and embedding [B, E] -> [B, out_channels, H', W'], where H' is H, H / 2 or 2 H.

    The embedding is added between the convolutions, and the sum of branch and shortcut multiplied by `scale`.
    Resampling takes place before the first convolution and on the shortcut, which is a convolution wherever the shape
    changes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        dropout: float,
        scale: float,
        *,
        resample: Resample = "none",
        attention: bool = False,
    ):
        super().__init__()
        self.resample, self.scale = resample, scale
        self.norm_in = group_norm(in_channels, _EPS)
        self.conv_in = xavier(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.embed = xavier(nn.Linear(embedding_width, out_channels))
        self.norm_out = group_norm(out_channels, _EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = xavier(nn.Conv2d(out_channels, out_channels, 3, padding=1), _NEARLY_ZERO)
        plain = in_channels == out_channels and resample == "none"
        self.shortcut = nn.Identity() if plain else xavier(nn.Conv2d(in_channels, out_channels, 1))
        self.attention = Attention(out_channels, scale) if attention else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(resampled(self.norm_in(x, silu=True), self.resample))
        h = self.norm_out(h + self.embed(embedding)[:, :, None, None], silu=True)
        h = (self.shortcut(resampled(x, self.resample)) + self.conv_out(self.dropout(h))) * self.scale
        out: torch.Tensor = h if self.attention is None else self.attention(h)
        return out


class Resampling(nn.Module):
    """[B, C, H, W] -> [B, C, H / 2, W / 2] or [B, C, 2 H, 2 W] by a convolution, as in DDPM. The embedding is not
    used."""

    def __init__(self, channels: int, resample: Resample):
        super().__init__()
        self.resample, down = resample, resample == "down"
        self.conv = xavier(nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.resample == "down" else resampled(x, self.resample)
        out: torch.Tensor = self.conv(x)
        return out


class DDPMpp(nn.Module):
    """F: noisy images and noise levels -> [B, C, H, W].

    Uses `base_channels`, `channel_mult`, `blocks_per_level`, `attention_resolutions`, `dropout` and `max_frequency` of
    the section `network`; EDM's value of the last is 1. Images whose sides are not multiples of 2**(stages - 1) are
    padded by replicating their edges, and the output is cropped. With `network.condition=channels` the conditioning
    image is concatenated with the noisy one. EDM's augmentation input is left out: it is zero in sampling, and its
    layer has no bias.

    Raises ValueError if the shape is not three positive numbers, or if no stage has an attention resolution.
    """

    Settings = DDPMppSettings

    def __init__(self, context: NetworkContext, settings: DDPMppSettings):
        super().__init__()
        self.config, self.settings = context.config, settings
        config = self.config
        self._max_frequency, stages = context.max_frequency, len(config.channel_mult)
        self._images = ImageInputs(config, context.shape, 2 ** (stages - 1))
        attended = attended_stages(config, self._images, [self._images.size[0] >> i for i in range(stages)])
        channels = config.base_channels
        self._embedding_width = 4 * channels
        self._pairs = (channels + 1) // 2
        self.label = xavier(nn.Linear(config.classes, 2 * self._pairs)) if config.classes else None
        self.noise_in = xavier(nn.Linear(2 * self._pairs, self._embedding_width))
        self.noise_out = xavier(nn.Linear(self._embedding_width, self._embedding_width))

        self.stem = xavier(nn.Conv2d(self._images.channels, channels, 3, padding=1))
        self.encoder, skips = nn.ModuleList(), [channels]
        for stage, multiplier in enumerate(config.channel_mult):
            if stage > 0:
                self.encoder.append(self._resampling(channels, "down"))
                skips.append(channels)
            for _ in range(config.blocks_per_level):
                wide = config.base_channels * multiplier
                self.encoder.append(self._block(channels, wide, attention=stage in attended))
                channels = wide
                skips.append(channels)
        self.middle_in = self._block(channels, channels, attention=True)
        self.middle_out = self._block(channels, channels)
        self.decoder = nn.ModuleList()
        for stage in reversed(range(stages)):
            if stage < stages - 1:
                self.decoder.append(self._resampling(channels, "up"))
            wide = config.base_channels * config.channel_mult[stage]
            for index in range(config.blocks_per_level + 1):
                attends = index == config.blocks_per_level or settings.decoder_attention == "all"
                self.decoder.append(self._block(channels + skips.pop(), wide, attention=attends and stage in attended))
                channels = wide
        assert not skips
        self.norm_out = group_norm(channels, _EPS)
        self.conv_out = xavier(nn.Conv2d(channels, context.shape[0], 3, padding=1), _NEARLY_ZERO)

    @classmethod
    def create(cls, context: NetworkContext, settings: DDPMppSettings) -> Self:
        """The factory of `network.name=ddpmpp`. Raises ConfigError for an invalid shape or configuration."""
        refuse_unused(context.config, USED)
        try:
            return cls(context, settings)
        except ValueError as error:
            raise ConfigError(f"network: {error}") from error

    def _block(self, into: int, out: int, *, resample: Resample = "none", attention: bool = False) -> Block:
        dropout, scale = self.config.dropout, self.settings.residual_scale
        return Block(into, out, self._embedding_width, dropout, scale, resample=resample, attention=attention)

    def _resampling(self, channels: int, resample: Resample) -> Block | Resampling:
        if self.settings.resampling == "convolution":
            return Resampling(channels, resample)
        return self._block(channels, channels, resample=resample)

    def forward(
        self,
        x: torch.Tensor,
        noise_level: torch.Tensor,
        condition: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, C, H, W], noise_level [B], condition [B, C, H, W], labels [B] int64 -> [B, C, H, W] float32.

        The label `config.classes` means "no label", as does `None`. Raises ValueError as `ImageInputs.check` does.
        """
        self._images.check(x, condition)
        embedding = self._embedding(noise_level, labels)
        x = self.stem(self._images.stack(x, condition, self.stem.weight.dtype))
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_out(self.middle_in(x, embedding), embedding)
        for block in self.decoder:
            x = block(x if block.resample == "up" else torch.cat([x, skips.pop()], dim=1), embedding)
        return self._images.crop(self.conv_out(self.norm_out(x, silu=True))).float()

    def _embedding(self, noise_level: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Noise levels [B] and labels [B] -> [B, E], with SiLU applied."""
        angle, dtype = noise_angles(noise_level, self._pairs, self._max_frequency), self.noise_in.weight.dtype
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
        if self.label is not None:
            classes = self.config.classes
            if labels is None:
                labels = torch.full((noise_level.shape[0],), classes, device=noise_level.device)
            one_hot = (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)
            embedding = embedding + self.label(one_hot * math.sqrt(classes))
        return F.silu(self.noise_out(F.silu(self.noise_in(embedding))))
