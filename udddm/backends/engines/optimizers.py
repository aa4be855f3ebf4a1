"""The optimizers of `train.optimizer`. All keep the state of Adam: two moments, and a count of steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from udddm.config import TrainConfig


def build(train: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimizer of `parameters`. Engines set its learning rate before every step."""
    given = {"lr": train.learning_rate, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "radam":
        return torch.optim.RAdam(parameters, **given, decoupled_weight_decay=True)  # type: ignore[arg-type]
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, **given, fused=True)  # type: ignore[arg-type]
