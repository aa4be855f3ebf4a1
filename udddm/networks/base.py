"""The contract of a network F(noisy image, noise level, conditioning image, label)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from udddm.config import NetworkConfig
from udddm.errors import ConfigError

_COMMON = {"name", "settings", "classes", "label_dropout", "dropout", "condition", "max_frequency"}
"""The keys of the section `network` that apply to every network of the package."""


class Network(Protocol):
    """A `torch.nn.Module` whose forward pass has this signature."""

    def __call__(
        self,
        noisy: torch.Tensor,
        c_noise: torch.Tensor,
        condition: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """F(noisy image, noise level, conditioning image, label): [B, C, H, W].

        Args:
            noisy: Noisy images [B, C, H, W], scaled to unit variance (`Coefficients.c_in`).
            c_noise: Noise levels [B].
            condition: Conditioning images [B, C, H, W], or None.
            labels: Class labels [B] int64, or None. The label `config.classes` means "no label".
        """


@dataclass(frozen=True)
class NetworkContext:
    """The argument of a network factory, called as `factory(context)` or `factory(context, settings)`."""

    config: NetworkConfig
    """`classes`, `condition` and `dropout` apply to every network. The U-Net uses all other keys, and `ddpmpp` some."""
    shape: tuple[int, int, int]
    """The shape (C, H, W) of an image."""
    max_frequency: float = 1.0
    """The highest frequency that the embedding of the noise level should resolve, in radians per unit."""


def refuse_unused(config: NetworkConfig, used: Collection[str] = ()) -> None:
    """Check the section `network` for a network that uses its common keys and those in `used`.

    Raises ConfigError for another key that is not at its default, and for cross-attention to a conditioning image,
    which only the U-Net has.
    """
    if config.condition == "cross-attention":
        raise ConfigError(
            f"network.condition=cross-attention: {config.name} has no cross-attention to a conditioning image; set "
            "network.condition=none, or channels, which concatenates it with the noisy image"
        )
    fields = type(config).model_fields
    unused = [
        name
        for name, field in fields.items()
        if name not in _COMMON and name not in used and getattr(config, name) != field.default
    ]
    if unused:
        defaults = {name: fields[name].default for name in unused}
        reset = " ".join(
            f"network.{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in defaults.items()
        )
        raise ConfigError(
            f"network.{', network.'.join(unused)}: network.name={config.name} does not use "
            f"{'it' if len(unused) == 1 else 'them'}; remove {'it' if len(unused) == 1 else 'them'}, or write {reset} "
            "if a preset sets them"
        )
