"""The cost of a network, compared with a count by hand and with the network itself."""

from __future__ import annotations

from typing import Any

import pytest

from udddm.config import NetworkConfig
from udddm.networks import build
from udddm.networks.cost import cost


def tiny(**changes: Any) -> NetworkConfig:
    settings: dict[str, Any] = {
        "base_channels": 8,
        "channel_mult": (1,),
        "blocks_per_level": 1,
        "attention_resolutions": (),
        "condition": "none",
    }
    return NetworkConfig(**(settings | changes))


def test_operations_equal_a_count_by_hand() -> None:
    side, width = 4, 8
    pixels = side * side

    def conv(into: int, out: int, kernel: int = 3) -> int:
        return 2 * pixels * kernel**2 * into * out

    def linear(into: int, out: int, rows: int = 1) -> int:
        return 2 * rows * into * out

    def block(into: int) -> int:
        shortcut = conv(into, width, 1) if into != width else 0
        return conv(into, width) + conv(width, width) + linear(4 * width, 2 * width) + shortcut

    attention = linear(width, 3 * width, pixels) + linear(width, width, pixels) + 2 * (2 * pixels * pixels * width)
    embedding = linear(width, 4 * width) + linear(4 * width, 4 * width)
    # Encoder: one block. Middle: two blocks and attention. Decoder: two blocks, each with a skip of `width` channels.
    by_hand = conv(1, width) + 3 * block(width) + 2 * block(2 * width) + attention + conv(width, 1) + embedding
    found = cost(tiny(), (1, side, side))
    assert found.forward == by_hand
    # Backward takes one product for the weights and one for the inputs; images and noise levels have no gradient.
    assert found.training == 3 * by_hand - conv(1, width) - linear(width, 4 * width)


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(classes=10),
        tiny(condition="cross-attention"),
        tiny(channel_mult=(1, 2), attention_resolutions=(4,), patch=2),
    ],
)
def test_parameters_equal_those_of_the_network(config: NetworkConfig) -> None:
    network = build(config, (1, 8, 8), max_frequency=16.0, seed=0)
    assert cost(config, (1, 8, 8)).parameters == sum(p.numel() for p in network.parameters())


def test_the_cost_of_the_paper_s_network_is_the_documented_one() -> None:
    found = cost(NetworkConfig(), (3, 32, 32))  # docs/method.md
    assert found.parameters == 61_752_195
    assert 2.9 * found.forward < found.training < 3 * found.forward
