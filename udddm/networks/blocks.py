"""Building blocks of the U-Net: noise-level embedding, residual blocks, attention, and tokens of the condition.

The blocks follow ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 3). Images are [B, C, H, W] and tokens are
[B, H * W, C]. In channels-last memory one is a view of the other, so attention needs no copies.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

Resample = Literal["none", "down", "up"]
Module = TypeVar("Module", bound=nn.Module)


def divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, and at least 1."""
    return next((d for d in range(min(number, limit), 1, -1) if number % d == 0), 1)


def dropout_layers(network: nn.Module) -> list[nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d]:
    """The dropout layers of a network, also inside of wrappers such as DDP. `p` is the probability of a layer."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return [layer for layer in network.modules() if isinstance(layer, kinds)]


class _Recomputed(torch.autograd.Function):
    """Calls a function, keeps its inputs alone, and computes it again in the backward pass.

    Results and gradients have the same bits as without it. A small function without random numbers does not need the
    hooks of `torch.utils.checkpoint`.
    """

    @staticmethod
    def forward(context: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
        context.function = function
        context.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = zip(context.saved_tensors, context.needs_input_grad[1:], strict=True)
        inputs = [None if x is None else x.detach().requires_grad_(needed) for x, needed in saved]
        with torch.enable_grad():
            output = context.function(*inputs)
        needed = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(output, needed, gradient))
        return None, *(next(found) if x is not None and x.requires_grad else None for x in inputs)


class GroupNorm(nn.GroupNorm):
    """Group normalization, optionally scaled, shifted and activated.

    Half-precision inputs stay in half precision under autocast, with sums in float32. Autocast on a GPU runs
    `group_norm` in float32, so that subsequent operations move and store four bytes per number. EDM also casts its
    weights to avoid this (github.com/NVlabs/edm, training/networks.py).
    """

    recompute = False
    """Keep only the input for the backward pass (`train.recompute`). A compiled network decides this itself."""

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        *,
        silu: bool = False,
    ) -> torch.Tensor:
        """[B, C, H, W] -> the same shape: normalized, times `scale` + 1 plus `shift` if given, and SiLU of it."""
        function = partial(_normalize, self.num_groups, self.eps, silu)
        inputs = x, self.weight, self.bias, scale, shift
        if not self.recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function(*inputs)
        output: torch.Tensor = _Recomputed.apply(function, *inputs)  # type: ignore[no-untyped-call]
        return output


def _normalize(
    groups: int,
    eps: float,
    silu: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    kind = x.device.type
    half = x.dtype != torch.float32 and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if half else contextlib.nullcontext():
        x = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
        if scale is not None and shift is not None:
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x) if silu else x


def group_norm(channels: int, eps: float = 1e-5) -> GroupNorm:
    """Group normalization with at most 32 groups, each of at least four channels if there are that many.

    Groups of a single channel would remove the channel's mean, which is the only information in a stage of 1x1 pixels.
    """
    return GroupNorm(divisor(channels, min(32, channels // 4)), channels, eps)


def zero(module: Module) -> Module:
    """Set the parameters of `module` to 0, so that a residual branch starts as the identity. Returns `module`."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def noise_angles(noise_level: torch.Tensor, count: int, max_frequency: float) -> torch.Tensor:
    """Noise levels [B] -> the arguments of sinusoids [B, count], float32.

    Frequencies, in radians per unit of noise level, decrease geometrically from `max_frequency` to 1e-4 of it.
    """
    # The frequencies are not a buffer because `module.bfloat16()` would round it: at noise level 1000, an error of 0.4%
    # rotates the fastest sinusoid by several radians.
    exponent = torch.linspace(0, -math.log(1e4), count, dtype=torch.float32, device=noise_level.device)
    return noise_level.float()[:, None] * (max_frequency * exponent.exp())


class NoiseEmbedding(nn.Module):
    """Noise levels [B] -> [B, out_width]: sinusoids in `width` channels (rounded up to even), followed by an MLP.

    The frequencies are those of `noise_angles`.
    """

    def __init__(self, width: int, out_width: int, max_frequency: float):
        super().__init__()
        self.pairs = (width + 1) // 2
        self.max_frequency = max_frequency
        self.linear_in = nn.Linear(2 * self.pairs, out_width)
        self.linear_out = nn.Linear(out_width, out_width)

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        angle = noise_angles(noise_level, self.pairs, self.max_frequency)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        hidden = F.silu(self.linear_in(waves.to(self.linear_in.weight.dtype)))
        embedding: torch.Tensor = self.linear_out(hidden)
        return embedding


def embedding_of(
    noise: NoiseEmbedding, noise_level: torch.Tensor, label: nn.Embedding | None, labels: torch.Tensor | None
) -> torch.Tensor:
    """The embedding [B, E] of noise levels [B] and labels [B], with SiLU applied.

    The last row of `label` means "no label", as does `labels` None. Without `label`, labels are ignored.
    """
    embedding: torch.Tensor = noise(noise_level)
    if label is not None:
        if labels is None:
            labels = torch.full((noise_level.shape[0],), label.num_embeddings - 1, device=noise_level.device)
        embedding = embedding + label(labels)
    return F.silu(embedding)


def resampled(x: torch.Tensor, resample: Resample) -> torch.Tensor:
    """[B, C, H, W] -> [B, C, H', W']: averages of 2x2 pixels ("down"), or each pixel as 2x2 pixels ("up")."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0) if resample == "up" else x


class ResidualBlock(nn.Module):
    """[B, in_channels, H, W] and embedding [B, E] -> [B, out_channels, H', W'], where H' is H, H / 2 or 2 H.

    The embedding scales and shifts the second normalization (FiLM; ADM's adaptive group normalization). SiLU must
    already be applied to it, so that blocks do not repeat that. Resampling takes place between the first activation and
    the first convolution, and on the shortcut.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_width: int, dropout: float, resample: Resample = "none"
    ):
        super().__init__()
        self.resample = resample
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(embedding_width, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(resampled(self.norm_in(x, silu=True), self.resample))
        x = resampled(x, self.resample)
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h, scale, shift, silu=True)
        out: torch.Tensor = self.shortcut(x) + self.conv_out(self.dropout(h))
        return out


def to_tokens(image: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H * W, C], without a copy."""
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: torch.Tensor, height: int) -> torch.Tensor:
    """[B, H * W, C] -> [B, C, H, W], without a copy."""
    batch, count, channels = tokens.shape
    return tokens.transpose(1, 2).view(batch, channels, height, count // height)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention: query [B, N, heads, D], key and value [B, M, heads, D] -> [B, N, heads * D]."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]: every position attends to all positions, with a residual connection."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.heads = divisor(channels, channels // head_dim)
        self.norm = group_norm(channels)
        # No bias: in the keys it would be a constant, which the softmax removes.
        self.query_key_value = nn.Linear(channels, 3 * channels, bias=False)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = self.query_key_value(to_tokens(self.norm(x)))
        query, key, value = projected.unflatten(2, (3, self.heads, -1)).unbind(2)
        return x + to_image(self.out(attend(query, key, value)), x.shape[2])


class ConditionTokens(nn.Module):
    """Conditioning images [B, C, P * h, P * w] -> tokens [B, h * w, channels]: embeddings of patch and position."""

    def __init__(self, image_channels: int, channels: int, patch: int, grid: tuple[int, int]):
        super().__init__()
        self.patch = nn.Conv2d(image_channels, channels, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], channels))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return to_tokens(self.patch(image)) + self.position


class CrossAttention(nn.Module):
    """[B, C, h, w] and tokens [B, h * w, C] -> [B, C, h, w]: residual attention to the conditioning image.

    Queries have a position embedding, as tokens do, so that a position can attend to the patch at the same position.
    """

    def __init__(self, channels: int, head_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.heads = divisor(channels, channels // head_dim)
        self.norm = group_norm(channels)
        self.position = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], channels))
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        query = self.query(to_tokens(self.norm(x)) + self.position).unflatten(2, (self.heads, -1))
        key, value = self.key_value(tokens).unflatten(2, (2, self.heads, -1)).unbind(2)
        return x + to_image(self.out(attend(query, key, value)), x.shape[2])
