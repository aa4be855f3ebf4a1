"""DINOv2's vision transformers, for FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675).

The architecture is that of Oquab et al. 2023 (arXiv 2304.07193) for the published files `dinov2_vits14_pretrain.pth`,
`vitb14` and `vitl14`, with their names of parameters. Published figures use ViT-L/14. The giant model and those with
registers have other layers and are refused by their parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

SIDE = 224
"""The height and width of the network's input."""
PATCH = 14
HEAD = 64
"""Channels of an attention head."""
OFFSET = 0.1
"""What the authors add to the number of patches before the position embeddings are interpolated. It belongs to the
published features: without it, the embeddings are sampled at other places."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, per channel, in [0, 1]."""


class Scale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x * self.gamma
        return found


class Attention(nn.Module):
    """Multi-head self-attention of tokens [B, N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        found: torch.Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return found


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return found


class Block(nn.Module):
    """A transformer block with pre-normalization and LayerScale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width), Scale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), MLP(width), Scale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        found: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return found


class PatchEmbedding(nn.Module):
    """Images [B, 3, H, W] to tokens [B, N, D], one for each patch of 14x14 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return found


class DINOv2(nn.Module):
    """Images uint8 [B, 3, H, W] to the normalized class token [B, width].

    Images are resized to 224x224 with bicubic interpolation and antialiasing, without rounding, and normalized with
    ImageNet's mean and deviation, as EDM2's evaluation does (Karras et al. 2024, arXiv 2312.02696).

    Args:
        width: channels of a token.
        depth: number of blocks.
        grid: patches per side in the stored position embeddings (37 for the published files, trained at 518x518).
    """

    def __init__(self, width: int, depth: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of the training; not used here
        self.patch_embed = PatchEmbedding(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> DINOv2:
        """A network without weights, of the size of these. Raises ValueError if they are of no such network."""
        position = weights.get("pos_embed")
        if position is None or position.ndim != 3 or position.shape[2] % HEAD:
            raise ValueError("they have no pos_embed [1, 1 + grid^2, width] as DINOv2 does")
        grid = round(max(position.shape[1] - 1, 0) ** 0.5)
        numbers = [name.split(".")[1] for name in weights if name.startswith("blocks.")]
        depth = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
        if not 1 <= depth <= 64 or not 0 < position.shape[2] <= 4096 or not 0 < grid <= 128:
            raise ValueError(f"{depth} blocks, width {position.shape[2]} and {grid}x{grid} patches are out of range")
        with torch.device("meta"):
            return cls(position.shape[2], depth, grid)

    def _positions(self) -> torch.Tensor:
        side = SIDE // PATCH
        if side == self.grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        factor = (side + OFFSET) / self.grid
        resized = nn.functional.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True) / 255
        mean, deviation = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
        tokens = self.patch_embed((x - mean) / deviation)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self._positions()
        for block in self.blocks:
            tokens = block(tokens)
        found: torch.Tensor = self.norm(tokens[:, 0])
        return found
