"""A small diffusion transformer with adaLN-zero (Peebles & Xie 2023, arXiv 2212.09748, DiT).

    PYTHONPATH=examples udddm-train --config digits \\
        --set network.name=custom_network:DiT --set 'network.settings={patch: 2, width: 96, depth: 4}'

Images become tokens, one per patch. The noise level and the label scale, shift and gate every block. The gates are
initialized with 0, so that each block starts as the identity and a new network returns 0.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from udddm.config import Section
from udddm.errors import ConfigError
from udddm.networks import NetworkContext
from udddm.networks.blocks import NoiseEmbedding, attend, to_image, to_tokens, zero


class Block(nn.Module):
    """Attention and an MLP on tokens [B, N, width], modulated by an embedding [B, width]."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.modulation = zero(nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(embedding)[:, None].chunk(6, dim=2)
        modulated = self.norms[0](x) * (1 + scale) + shift
        query, key, value = self.query_key_value(modulated).unflatten(2, (3, self.heads, -1)).unbind(2)
        x = x + gate * self.out(attend(query, key, value))
        moved: torch.Tensor = x + gate_mlp * self.mlp(self.norms[1](x) * (1 + scale_mlp) + shift_mlp)
        return moved


class DiT(nn.Module):
    """The network: images [B, C, H, W] -> [B, C, H, W]."""

    class Settings(Section):
        """The section `network.settings`."""

        patch: int = Field(2, gt=0)
        width: int = Field(96, gt=0)
        depth: int = Field(4, gt=0)
        heads: int = Field(4, gt=0)

    def __init__(self, context: NetworkContext, settings: Settings):
        super().__init__()
        channels, height, width = context.shape
        self.patch, self.classes, self.conditioned = settings.patch, context.config.classes, context.config.conditioned
        if height % self.patch or width % self.patch:
            raise ConfigError(f"network.settings.patch: {self.patch} does not divide images of {height}x{width}")
        if settings.width % settings.heads:
            raise ConfigError(f"network.settings: heads {settings.heads} must divide width {settings.width}")
        self.rows = height // self.patch
        pixels = channels * self.patch**2
        tokens = self.rows * (width // self.patch)
        # A conditioning image, if any, is concatenated with the noisy image.
        self.embed = nn.Linear(pixels * (2 if self.conditioned else 1), settings.width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, settings.width))
        self.noise = NoiseEmbedding(settings.width, settings.width, context.max_frequency)
        self.label = nn.Embedding(self.classes + 1, settings.width) if self.classes else None
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.heads, context.config.dropout) for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, elementwise_affine=False)
        self.modulation = zero(nn.Linear(settings.width, 2 * settings.width))
        self.out = zero(nn.Linear(settings.width, pixels))

    @classmethod
    def create(cls, context: NetworkContext, settings: Settings) -> Self:
        return cls(context, settings)

    def forward(
        self,
        noisy: torch.Tensor,
        c_noise: torch.Tensor,
        condition: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W], see udddm.networks.Network. The label `classes` means "no label"."""
        embedding = self.noise(c_noise)
        if self.label is not None:
            none = torch.full((len(noisy),), self.classes, device=noisy.device)
            embedding = embedding + self.label(none if labels is None else labels)
        embedding = F.silu(embedding)
        if self.conditioned:
            assert condition is not None
            noisy = torch.cat([noisy, condition], dim=1)
        x = self.embed(to_tokens(F.pixel_unshuffle(noisy, self.patch))) + self.position
        for block in self.blocks:
            x = block(x, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        return F.pixel_shuffle(to_image(x, self.rows), self.patch).float()
