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
    group_norm,
    zero,
)


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
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"an image's shape must be (channels, height, width), all at least 1, not {tuple(shape)}")
        self.config, self.shape = config, (shape[0], shape[1], shape[2])
        image_channels, height, width = self.shape
        stages = len(config.channel_mult)
        multiple = config.patch * 2 ** (stages - 1)
        down, across = -height % multiple, -width % multiple
        self._padding = (across // 2, across - across // 2, down // 2, down - down // 2)
        rows, columns = (height + down) // config.patch, (width + across) // config.patch
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
        self.stem = nn.Conv2d(pixels * (2 if config.condition == "channels" else 1), channels, 3, padding=1)
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
        self._check(x, "x")
        embedding = self.noise_embedding(noise_level)
        if self.label_embedding is not None:
            if labels is None:
                labels = torch.full((x.shape[0],), self.config.classes, device=x.device)
            embedding = embedding + self.label_embedding(labels)
        embedding = F.silu(embedding)
        if self.config.conditioned:
            self._check_condition(condition, x.shape[0])
        tokens = self._tokens(condition)

        x = F.pixel_unshuffle(self._pad(x), self.config.patch)
        if self.config.condition == "channels":
            assert condition is not None
            x = torch.cat([x, F.pixel_unshuffle(self._pad(condition), self.config.patch)], dim=1)
        x = self.stem(x)
        skips = [x]
        for layer in self.encoder:
            x = layer(x, embedding, tokens)
            skips.append(x)
        x = self.middle_out(self.middle_in(x, embedding, tokens), embedding, tokens)
        for layer in self.decoder:
            x = layer(torch.cat([x, skips.pop()], dim=1), embedding, tokens)
        x = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.config.patch)
        left, _, top, _ = self._padding
        _, height, width = self.shape
        return x[:, :, top : top + height, left : left + width].float()

    def _check_condition(self, condition: torch.Tensor | None, count: int) -> None:
        if condition is None:
            raise ValueError(
                f"this network takes a conditioning image (network.condition={self.config.condition}), but none was "
                "given: pass one, or set network.condition=none"
            )
        self._check(condition, "condition")
        if condition.shape[0] != count:
            raise ValueError(
                f"there are {count} images, but {condition.shape[0]} conditioning images: pass one per image"
            )

    def _tokens(self, condition: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Per stage, the tokens [B, h * w, C] of the conditioning images, or None without cross-attention."""
        tokens: list[torch.Tensor | None] = [None] * len(self._grids)
        if not self.condition_tokens or condition is None:
            return tokens
        image = self._pad(condition)
        for stage, embed in self.condition_tokens.items():
            tokens[int(stage)] = embed(image)
        return tokens

    def _pad(self, image: torch.Tensor) -> torch.Tensor:
        image = image.to(self.stem.weight.dtype)  # for a network cast with `module.to`; no effect under autocast
        return F.pad(image, self._padding, mode="replicate") if any(self._padding) else image

    def _check(self, image: torch.Tensor, name: str) -> None:
        if image.shape[1:] != self.shape:
            raise ValueError(f"{name} is {list(image.shape)}, but the network was built for [B, *{list(self.shape)}]")

    def _attended_stages(self) -> set[int]:
        sides = [grid[0] for grid in self._grids]
        missing = sorted(set(self.config.attention_resolutions) - set(sides))
        default = self.config.attention_resolutions == NetworkConfig.model_fields["attention_resolutions"].default
        if missing and not default:
            _, height, width = self.shape
            padded = f", padded to {sides[0]}x{self._grids[0][1]}" if any(self._padding) else ""
            raise ValueError(
                f"network.attention_resolutions: no stage has side {', '.join(map(str, missing))}; images of "
                f"{height}x{width} pixels{padded} give {len(sides)} stages with sides {', '.join(map(str, sides))}"
            )
        return {stage for stage, side in enumerate(sides) if side in self.config.attention_resolutions}

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
