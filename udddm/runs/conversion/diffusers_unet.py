"""diffusers' `UNet2DModel` as a `DDPMpp` with the settings of DDPM, such as `google/ddpm-cifar10-32`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from udddm.config import RunConfig
from udddm.networks.ddpmpp import DDPMppSettings
from udddm.runs.conversion.converted import Read, Source, epsilon, joined, tensor_of
from udddm.runs.weights import Saved

FIXED = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "norm_eps": (1e-6, 1e-5),
    "norm_num_groups": (32, 32),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
"""What makes a model a DDPM of this package, and diffusers' default, by key."""
_BLOCK = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embed": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "conv_shortcut",
}
"""Layer of diffusers' blocks by our name."""
_ATTENTION = (
    {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    {"q": "query", "k": "key", "v": "value", "out": "proj_attn"},
)
"""Layers of diffusers' attention, and their names in older files, which diffusers still reads."""


def wanted(source: Source, config: RunConfig, shape: tuple[int, int, int]) -> dict[str, tuple[Any, Any]]:
    """(wanted, found) of the settings on which f depends, by key. The defaults are those of diffusers.

    Raises CheckpointError for an architecture that `DDPMpp` cannot express.
    """
    network = config.network
    widths = source.counts("block_out_channels", (224, 448, 672, 896))
    down = source.texts("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3))
    up = source.texts("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D"))
    attended = [name == "AttnDownBlock2D" for name in down]
    mirrored = ["AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attended)]
    if list(up) != mirrored or not set(down) <= {"DownBlock2D", "AttnDownBlock2D"} or len(widths) != len(down):
        source.refuse(f"its blocks are {', '.join((*down, *up))}; DDPM has AttnDownBlock2D where AttnUpBlock2D is")
    if any(width % 32 or width < 128 or width % widths[0] for width in widths):
        source.refuse(f"its widths are {widths}; give multiples of the first, of 32, and of at least 128")
    side, channels = source.count("sample_size", 0), source.count("in_channels", 3)
    if source.count("out_channels", channels) != channels:
        source.refuse("it predicts variances")
    heads = source.described.get("attention_head_dim", 8)
    attending = {width for width, each in zip(widths, attended, strict=True) if each} | {widths[-1]}
    if heads is not None and attending != {heads}:
        source.refuse(f"its attention_head_dim is {str(heads)[:20]}; DDPM has one head")
    settings = DDPMppSettings.model_validate(network.settings if network.name == "ddpmpp" else {})
    sides = tuple(side >> stage for stage in range(len(widths)))
    return {
        "network.name": ("ddpmpp", network.name),
        "network.classes": (0, network.classes),
        "network.base_channels": (widths[0], network.base_channels),
        "network.channel_mult": (tuple(width // widths[0] for width in widths), network.channel_mult),
        "network.blocks_per_level": (source.count("layers_per_block", 2), network.blocks_per_level),
        "network.attention_resolutions": (
            tuple(each for each, attends in zip(sides, attended, strict=True) if attends),
            tuple(each for each in sides if each in network.attention_resolutions),
        ),
        "network.settings.resampling": ("convolution", settings.resampling),
        "network.settings.rescale": (False, settings.rescale),
        "network.settings.decoder_attention": ("all", settings.decoder_attention),
        "the shape of an image": ((channels, side, side), shape),
        **epsilon(config),
    }


def tensors(saved: Saved, config: RunConfig, shape: tuple[int, int, int]) -> Iterator[tuple[str, Read]]:
    """Name in `DDPMpp` and tensor."""
    stages, blocks = len(config.network.channel_mult), config.network.blocks_per_level
    for ours, theirs in (
        ("noise_in", "time_embedding.linear_1"),
        ("noise_out", "time_embedding.linear_2"),
        ("stem", "conv_in"),
        ("norm_out", "conv_norm_out"),
        ("conv_out", "conv_out"),
    ):
        yield from _layer(saved, ours, theirs)
    yield from _block(saved, "middle_in", "mid_block", 0)
    yield from _block(saved, "middle_out", "mid_block", 1)
    index = 0
    for stage in range(stages):
        for block in range(blocks):
            yield from _block(saved, f"encoder.{index}", f"down_blocks.{stage}", block)
            index += 1
        if stage < stages - 1:
            yield from _layer(saved, f"encoder.{index}.conv", f"down_blocks.{stage}.downsamplers.0.conv")
            index += 1
    index = 0
    for stage in range(stages):
        for block in range(blocks + 1):
            yield from _block(saved, f"decoder.{index}", f"up_blocks.{stage}", block)
            index += 1
        if stage < stages - 1:
            yield from _layer(saved, f"decoder.{index}.conv", f"up_blocks.{stage}.upsamplers.0.conv")
            index += 1


def _layer(saved: Saved, ours: str, theirs: str) -> Iterator[tuple[str, Read]]:
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", partial(tensor_of, saved, f"{theirs}.{kind}")


def _block(saved: Saved, ours: str, group: str, block: int) -> Iterator[tuple[str, Read]]:
    for name, layer in _BLOCK.items():
        if name != "shortcut" or f"{group}.resnets.{block}.{layer}.weight" in saved:
            yield from _layer(saved, f"{ours}.{name}", f"{group}.resnets.{block}.{layer}")
    attention = f"{group}.attentions.{block}"
    if f"{attention}.group_norm.weight" not in saved:
        return
    names = next((each for each in _ATTENTION if f"{attention}.{each['q']}.weight" in saved), _ATTENTION[0])
    yield from _layer(saved, f"{ours}.attention.norm", f"{attention}.group_norm")
    yield from _layer(saved, f"{ours}.attention.out", f"{attention}.{names['out']}")
    for kind in ("weight", "bias"):
        parts = [f"{attention}.{names[each]}.{kind}" for each in "qkv"]
        yield f"{ours}.attention.query_key_value.{kind}", partial(joined, partial(tensor_of, saved), parts)
