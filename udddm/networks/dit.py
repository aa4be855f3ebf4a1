"""The diffusion transformer with adaLN-zero, DiT (Peebles & Xie 2023, arXiv 2212.09748).

Images become tokens, one per patch, with fixed positions. The noise level and the label scale, shift and gate every
block (adaLN-zero, section 3.2). The gates and the output are initialized with 0, so that each block starts as the
identity and a new network returns 0.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from udddm.config import Section
from udddm.errors import ConfigError
from udddm.networks.base import NetworkContext, refuse_unused
from udddm.networks.blocks import NoiseEmbedding, attend, embedding_of, to_image, to_tokens, zero
from udddm.networks.images import ImageInputs

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of the sizes in Table 1 of the paper."""
FREQUENCIES = 256
"""Channels of the sinusoids that embed the noise level, as in the paper's code."""
_EPS = 1e-6

_MOST_TOKENS = 1 << 16
"""Attention to more tokens would not fit any device."""

Dimension = Annotated[int, Field(ge=1, le=1 << 16)]


class DiTSettings(Section):
    """The section `network.settings` of `network.name=dit`."""

    size: Literal["S", "B", "L", "XL"] = Field("S", description="size in the paper's Table 1")
    patch: Annotated[int, Field(ge=1, le=1024)] = Field(
        2, description="side of the patches that become tokens", json_schema_extra={"unit": "pixels"}
    )
    width: Dimension | None = Field(
        None, description="channels of a token; unset: that of `size`", json_schema_extra={"unit": "channels"}
    )
    depth: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="number of blocks; unset: that of `size`", json_schema_extra={"unit": "blocks"}
    )
    heads: Dimension | None = Field(
        None, description="attention heads per block; unset: that of `size`", json_schema_extra={"unit": "heads"}
    )

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Width, depth and heads."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @model_validator(mode="after")
    def _divisible(self) -> DiTSettings:
        width, _, heads = self.dimensions
        if width % heads:
            raise ValueError(f"heads ({heads}) must divide width ({width})")
        if width % 4:
            raise ValueError(
                f"width ({width}) must be a multiple of 4: a sine and a cosine for each of two coordinates"
            )
        return self


def positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed embeddings of the positions of a grid, row by row: [rows * columns, width], float32.

    The first half of the channels embeds the column and the second half the row; each half is the sines of width / 4
    frequencies 10000^(-4 i / width), followed by their cosines (as in the paper's code and in Vaswani et al. 2017).
    """
    frequencies = torch.exp(torch.arange(width // 4, dtype=torch.float64) * (-4 * math.log(1e4) / width))

    def embed(count: int) -> torch.Tensor:
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column = embed(columns)[None].expand(rows, -1, -1)
    row = embed(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer normalization of tokens x [B, N, width] without parameters, then (1 + scale) and shift [B, 1, width]."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and an MLP on tokens [B, N, width], modulated by an embedding [B, width] to which SiLU is applied."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.mlp_out = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(embedding)[:, None].chunk(6, dim=2)
        projected = self.query_key_value(modulate(x, shift, scale))
        query, key, value = projected.unflatten(2, (3, self.heads, -1)).unbind(2)
        x = x + gate * self.out(attend(query, key, value))
        hidden = F.gelu(self.mlp_in(modulate(x, shift_mlp, scale_mlp)), approximate="tanh")
        out: torch.Tensor = x + gate_mlp * self.mlp_out(self.dropout(hidden))
        return out


class DiT(nn.Module):
    """F: noisy images and noise levels -> [B, C, H, W].

    Images whose sides are not multiples of the patch are padded by replicating their edges, and the output is cropped.
    `network.dropout` acts on the hidden units of the MLPs; the paper uses none. With `network.condition=channels` the
    conditioning image is concatenated with the noisy one. The output has the channels of the image: the variances that
    the paper's models also predict have no use here.

    Raises ValueError if the shape is not three positive numbers, and for more than 65,536 tokens.
    """

    Settings = DiTSettings

    def __init__(self, context: NetworkContext, settings: DiTSettings):
        super().__init__()
        self.config = context.config
        self._images, self._patch = ImageInputs(context.config, context.shape, settings.patch), settings.patch
        width, depth, heads = settings.dimensions
        self._rows, columns = (side // settings.patch for side in self._images.size)
        if self._rows * columns > _MOST_TOKENS:
            raise ValueError(
                f"network.settings.patch={settings.patch} makes {self._rows * columns} tokens of an image, more than "
                f"{_MOST_TOKENS}; use larger patches"
            )
        self.embed = nn.Linear(self._images.channels * settings.patch**2, width)
        self.noise_embedding = NoiseEmbedding(FREQUENCIES, width, context.max_frequency)
        self.label_embedding = nn.Embedding(self.config.classes + 1, width) if self.config.classes else None
        self.blocks = nn.ModuleList(Block(width, heads, self.config.dropout) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, context.shape[0] * settings.patch**2)
        self.register_buffer("positions", positions(self._rows, columns, width), persistent=False)
        self._initialize()

    @classmethod
    def create(cls, context: NetworkContext, settings: DiTSettings) -> Self:
        """The factory of `network.name=dit`. Raises ConfigError for an invalid shape or configuration."""
        refuse_unused(context.config)
        try:
            return cls(context, settings)
        except ValueError as error:
            raise ConfigError(f"network: {error}") from error

    def _initialize(self) -> None:
        """Xavier-uniform weights, embeddings with a standard deviation of 0.02, and 0 where blocks must be the
        identity, as in the paper's code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for linear in (self.noise_embedding.linear_in, self.noise_embedding.linear_out):
            nn.init.normal_(linear.weight, std=0.02)
        for name, module in self.named_modules():
            if name == "out" or name.endswith("modulation"):
                zero(module)

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
        embedding = embedding_of(self.noise_embedding, noise_level, self.label_embedding, labels)
        x = self._images.stack(x, condition, self.embed.weight.dtype)
        # Under autocast this sum, and with it all residual sums, is float32.
        x = self.embed(to_tokens(F.pixel_unshuffle(x, self._patch))) + self.positions
        for block in self.blocks:
            x = block(x, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
        x = self.out(modulate(x, shift, scale))
        return self._images.crop(F.pixel_shuffle(to_image(x, self._rows), self._patch)).float()
