"""The ADM U-Net (Dhariwal & Nichol 2021, arXiv 2105.05233) with cross-attention to the conditioning image.

The uDDDM paper (arXiv 2405.21059, section 4) specifies the stages, the blocks, the dropout and the stages with
attention. It does not specify how the image is converted to tokens. This implementation uses a learned patch embedding
with one token per pixel of the stage.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from udddm.config import NetworkConfig
from udddm.errors import ConfigError
from udddm.networks.base import NetworkContext
from udddm.networks.blocks import (
    ConditionTokens,
    CrossAttention,
    NoiseEmbedding,
    Resample,
    ResidualBlock,
    SelfAttention,
    embedding_of,
    group_norm,
    zero,
)
from udddm.networks.images import ImageInputs, attended_stages


class Layer(nn.Module):
    """A residual block, optionally followed by self-attention, cross-attention, and upsampling to the next stage."""

    def __init__(
        self,
        stage: int,
        block: ResidualBlock,
        attention: SelfAttention | None = None,
        cross: CrossAttention | None = None,
        up: ResidualBlock | None = None,
    ):
        super().__init__()
        self.stage, self.block, self.attention, self.cross, self.up = stage, block, attention, cross, up

    def forward(
        self, x: torch.Tensor, embedding: torch.Tensor, stage_tokens: list[torch.Tensor | None]
    ) -> torch.Tensor:
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None:
            tokens = stage_tokens[self.stage]
            assert tokens is not None
            x = self.cross(x, tokens)
        return x if self.up is None else self.up(x, embedding)


class UNet(nn.Module):
    """F: noisy images, noise levels and conditioning images -> [B, C, H, W].

    `shape` is the shape (C, H, W) of one image. Height and width are arbitrary: images are padded, by replicating their
    edges, to multiples of patch * 2**(stages - 1), and the output is cropped. If `config.patch` is above 1, blocks of
    patch x patch pixels are first moved to channels (pixel unshuffle). Stage `i` then has 2**-i of the remaining height
    and width. `config.attention_resolutions` selects stages by height. The middle block, in the last stage, always has
    attention.

    `max_frequency` is the highest frequency of the noise-level embedding, in radians per unit: 1 for levels in
    [0, 1000] (as in DDPM), and more for levels such as ln(sigma) / 4, which span a few units.

    Raises ValueError if the shape is not three positive numbers, or if no stage has an attention resolution; the
    default resolutions apply where there are such stages.
    """

    def __init__(self, config: NetworkConfig, shape: tuple[int, int, int], *, max_frequency: float = 1.0):
        super().__init__()
        stages = len(config.channel_mult)
        self.config, self._images = config, ImageInputs(config, shape, config.patch * 2 ** (stages - 1))
        self.shape = self._images.shape
        image_channels, _, _ = self.shape
        rows, columns = (side // config.patch for side in self._images.size)
        self._grids = [(rows >> i, columns >> i) for i in range(stages)]
        self._channels = [config.base_channels * multiplier for multiplier in config.channel_mult]
        self._embedding_width = 4 * config.base_channels
        self._attended = self._attended_stages()  # without the attention of the middle block

        self.noise_embedding = NoiseEmbedding(config.base_channels, self._embedding_width, max_frequency)
        self.label_embedding = nn.Embedding(config.classes + 1, self._embedding_width) if config.classes else None
        self.condition_tokens = nn.ModuleDict()  # one per stage with attention, shared by the layers of the stage
        if config.condition == "cross-attention":
            for stage in sorted(self._attended | {stages - 1}):
                self.condition_tokens[str(stage)] = ConditionTokens(
                    image_channels, self._channels[stage], config.patch * 2**stage, self._grids[stage]
                )

        channels = self._channels[0]
        pixels = image_channels * config.patch**2
        self.stem = nn.Conv2d(self._images.channels * config.patch**2, channels, 3, padding=1)
        skips = [channels]
        self.encoder = nn.ModuleList()
        for stage, out_channels in enumerate(self._channels):
            if stage > 0:
                self.encoder.append(Layer(stage, self._resampling(channels, "down")))
                skips.append(channels)
            for _ in range(config.blocks_per_level):
                self.encoder.append(self._layer(stage, channels, stage in self._attended))
                channels = out_channels
                skips.append(channels)
        self.middle_in = self._layer(stages - 1, channels, True)
        self.middle_out = self._layer(stages - 1, channels, False)
        self.decoder = nn.ModuleList()
        for stage in reversed(range(stages)):
            for index in range(config.blocks_per_level + 1):
                layer = self._layer(stage, channels + skips.pop(), stage in self._attended)
                channels = self._channels[stage]
                if stage > 0 and index == config.blocks_per_level:
                    layer.up = self._resampling(channels, "up")
                self.decoder.append(layer)
        assert not skips
        self.norm_out = group_norm(channels)
        self.conv_out = zero(nn.Conv2d(channels, pixels, 3, padding=1))

    def forward(
        self,
        x: torch.Tensor,
        noise_level: torch.Tensor,
        condition: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, C, H, W], noise_level [B], condition [B, C, H, W], labels [B] int64 -> [B, C, H, W].

        Pass `noise_level` in float32. The output is float32, whatever the precision of the network. The label
        `config.classes` means "no label", as does `None`. The condition is ignored if `config.condition` is "none", and
        labels are ignored if `config.classes` is 0.

        Raises ValueError if the shape of an image differs from the network's, or if a required condition is missing.
        """
        self._images.check(x, condition)
        embedding = embedding_of(self.noise_embedding, noise_level, self.label_embedding, labels)
        tokens = self._tokens(condition)
        x = self._images.stack(x, condition, self.stem.weight.dtype)
        x = self.stem(F.pixel_unshuffle(x, self.config.patch))
        skips = [x]
        for layer in self.encoder:
            x = layer(x, embedding, tokens)
            skips.append(x)
        x = self.middle_out(self.middle_in(x, embedding, tokens), embedding, tokens)
        for layer in self.decoder:
            x = layer(torch.cat([x, skips.pop()], dim=1), embedding, tokens)
        x = F.pixel_shuffle(self.conv_out(self.norm_out(x, silu=True)), self.config.patch)
        return self._images.crop(x).float()

    def _tokens(self, condition: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Per stage, the tokens [B, h * w, C] of the conditioning images, or None without cross-attention."""
        tokens: list[torch.Tensor | None] = [None] * len(self._grids)
        if not self.condition_tokens or condition is None:
            return tokens
        image = self._images.pad(condition, self.stem.weight.dtype)
        for stage, embed in self.condition_tokens.items():
            tokens[int(stage)] = embed(image)
        return tokens

    def _attended_stages(self) -> set[int]:
        return attended_stages(self.config, self._images, [rows for rows, _ in self._grids])

    def _layer(self, stage: int, in_channels: int, attention: bool) -> Layer:
        channels, head_dim = self._channels[stage], self.config.head_dim
        crossing = attention and self.config.condition == "cross-attention"
        return Layer(
            stage,
            ResidualBlock(in_channels, channels, self._embedding_width, self.config.dropout),
            SelfAttention(channels, head_dim) if attention else None,
            CrossAttention(channels, head_dim, self._grids[stage]) if crossing else None,
        )

    def _resampling(self, channels: int, resample: Resample) -> ResidualBlock:
        return ResidualBlock(channels, channels, self._embedding_width, self.config.dropout, resample)


def build(context: NetworkContext) -> UNet:
    """The factory of `network.name=unet`. Raises ConfigError for an invalid shape or configuration."""
    try:
        return UNet(context.config, context.shape, max_frequency=context.max_frequency)
    except ValueError as error:
        raise ConfigError(f"network: {error}") from error
