"""diffusers' `DiTTransformer2DModel` as a `DiT`.

diffusers keeps a copy of the embeddings of noise level and label in each block, which must be equal, because a DiT has
one. Outputs for predicted variances are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from udddm.config import RunConfig
from udddm.errors import CheckpointError
from udddm.networks.dit import DiTSettings
from udddm.runs.conversion.converted import Read, Source, epsilon, joined, tensor_of
from udddm.runs.weights import Saved

FIXED = {
    "norm_type": ("ada_norm_zero", "ada_norm_zero"),
    "activation_fn": ("gelu-approximate", "gelu-approximate"),
    "attention_bias": (True, True),
    "norm_elementwise_affine": (False, False),
}
"""What makes a model a DiT, and diffusers' default, by key."""
_BLOCK = {
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
    "out": "attn1.to_out.0",
    "modulation": "norm1.linear",
}
"""Layer of diffusers' blocks by our name."""
_SHARED = ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "class_embedder.embedding_table")


def wanted(source: Source, config: RunConfig, shape: tuple[int, int, int]) -> dict[str, tuple[Any, Any]]:
    """(wanted, found) of the settings on which f depends, by key. The defaults are those of diffusers."""
    heads, width = source.count("num_attention_heads", 16), source.count("attention_head_dim", 72)
    side, channels = source.count("sample_size", 32), source.count("in_channels", 4)
    needed: dict[str, tuple[Any, Any]] = {
        "network.name": ("dit", config.network.name),
        "network.classes": (source.count("num_embeds_ada_norm", 1000), config.network.classes),
        "the shape of an image": ((channels, side, side), shape),
        **epsilon(config),
    }
    if config.network.name == "dit":
        settings = DiTSettings.model_validate(config.network.settings)
        our_width, our_depth, our_heads = settings.dimensions
        needed |= {
            "network.settings.patch": (source.count("patch_size", 2), settings.patch),
            "network.settings.width": (heads * width, our_width),
            "network.settings.depth": (source.count("num_layers", 28), our_depth),
            "network.settings.heads": (heads, our_heads),
        }
    return needed


def tensors(saved: Saved, config: RunConfig, shape: tuple[int, int, int]) -> Iterator[tuple[str, Read]]:
    """Name in `DiT` and tensor. Raises CheckpointError for blocks whose embeddings differ."""
    settings = DiTSettings.model_validate(config.network.settings)
    get = partial(tensor_of, saved)
    first = "transformer_blocks.0.norm1.emb"
    _check_shared(get, settings.dimensions[1], str(saved.path))
    yield "embed.weight", lambda: get("pos_embed.proj.weight").flatten(1)
    yield "embed.bias", partial(get, "pos_embed.proj.bias")
    yield "label_embedding.weight", partial(get, f"{first}.class_embedder.embedding_table.weight")
    for kind in ("weight", "bias"):
        yield f"noise_embedding.linear_in.{kind}", partial(get, f"{first}.timestep_embedder.linear_1.{kind}")
        yield f"noise_embedding.linear_out.{kind}", partial(get, f"{first}.timestep_embedder.linear_2.{kind}")
        yield f"modulation.{kind}", partial(get, f"proj_out_1.{kind}")
        yield f"out.{kind}", partial(_pixels, get, f"proj_out_2.{kind}", settings.patch, shape[0])
        for block in range(settings.dimensions[1]):
            ours, theirs = f"blocks.{block}", f"transformer_blocks.{block}"
            attention = [f"{theirs}.attn1.to_{name}.{kind}" for name in "qkv"]
            yield f"{ours}.query_key_value.{kind}", partial(joined, get, attention)
            for name, layer in _BLOCK.items():
                yield f"{ours}.{name}.{kind}", partial(get, f"{theirs}.{layer}.{kind}")


def _check_shared(get: Callable[[str], torch.Tensor], depth: int, where: str) -> None:
    for name in _SHARED:
        for kind in ("weight",) if name.endswith("table") else ("weight", "bias"):
            first = get(f"transformer_blocks.0.norm1.emb.{name}.{kind}")
            for block in range(1, depth):
                if not torch.equal(get(f"transformer_blocks.{block}.norm1.emb.{name}.{kind}"), first):
                    raise CheckpointError(
                        f"{where}: block {block} has another {name} than block 0; a DiT has one for all blocks"
                    )


def _pixels(get: Callable[[str], torch.Tensor], name: str, patch: int, channels: int) -> torch.Tensor:
    """Rows (row, column, channel) of the patch as (channel, row, column), without those of predicted variances."""
    found, pixels = get(name), patch**2
    if len(found) not in (pixels * channels, pixels * 2 * channels):
        return found  # its shape is reported as wrong
    return found.view(pixels, -1, *found.shape[1:])[:, :channels].transpose(0, 1).flatten(0, 1)
