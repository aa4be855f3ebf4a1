"""`train.recompute`: less memory, the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from udddm.config import RunConfig, resolve
from udddm.errors import ConfigError
from udddm.networks import for_run
from udddm.networks.activations import bytes_per_image
from udddm.networks.blocks import GroupNorm

SHAPE = (1, 8, 8)
WITH = pytest.mark.parametrize("name", ["unet", "ddpmpp"])


def config(name: str, recompute: bool, **network: Any) -> RunConfig:
    sizes = {"base_channels": 16, "channel_mult": [1, 2], "blocks_per_level": 1, "attention_resolutions": [4]}
    return resolve(
        {
            "network": {"name": name, "dropout": 0.3, "condition": "none"} | (network or sizes),
            "train": {"steps": 10, "batch_size": 8, "recompute": recompute},
        }
    )


def passed(name: str, recompute: bool, precision: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The output and all gradients of a pass with dropout."""
    network = for_run(config(name, recompute), SHAPE)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():  # so that no branch is zero
        nn.init.normal_(parameter, std=0.3 / max(1, parameter[0].numel()) ** 0.5, generator=generator)
    x = torch.randn(4, *SHAPE, generator=generator).requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        out = network(x, torch.rand(4, generator=generator) * 4 - 1, None, None)
    out.square().sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        found[key] = parameter.grad
    return found


@WITH
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_outputs_and_gradients_have_the_same_bits(name: str, precision: torch.dtype | None) -> None:
    kept, computed_again = (passed(name, recompute, precision) for recompute in (False, True))
    assert kept.keys() == computed_again.keys()
    for key, value in kept.items():
        assert value.abs().max() > 0, key
        assert torch.equal(value, computed_again[key]), key


@WITH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_less_is_kept_for_the_backward_pass(name: str, precision: str) -> None:
    network = config(name, False, channel_mult=[1, 2, 2], base_channels=32).network
    kept, fewer = (bytes_per_image(network, (3, 32, 32), precision, recompute) for recompute in (False, True))
    assert fewer < 0.75 * kept


def test_a_frozen_weight_needs_no_gradient() -> None:
    layer = GroupNorm(2, 4)
    layer.recompute = True
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(x, silu=True).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None and x.grad is not None


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.recompute=true: network.name=dit has no layers"):
        for_run(config("dit", True, settings={"width": 32, "depth": 1, "heads": 4}), SHAPE)
