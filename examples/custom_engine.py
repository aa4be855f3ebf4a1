"""The torch engine with AdamW or RAdam instead of Adam.

    PYTHONPATH=examples udddm-train --config digits --engine custom_engine:Decoupled \\
        --set 'engine.settings={optimizer: radam, weight_decay: 0.01}'

Everything except the optimizer is inherited from `TorchEngine`: DDP over several ranks, autocast, clipping, learning
rates and checkpoints. The optimizer must have Adam's state (`exp_avg`, `exp_avg_sq`, `step`), which checkpoints contain
and every engine reads. An optimizer with other state causes an error at the first checkpoint.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from udddm.backends.engines import EngineContext
from udddm.backends.engines.ddp import TorchEngine
from udddm.config import Section


class Decoupled(TorchEngine):
    """The torch engine with decoupled weight decay."""

    class Settings(Section):
        """The section `engine.settings`."""

        optimizer: Literal["adamw", "radam"] = "adamw"
        weight_decay: float = Field(0.01, ge=0)

    def __init__(self, context: EngineContext, settings: Settings):
        self.settings = settings  # before the constructor of TorchEngine calls `optimizer`
        super().__init__(context)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        rate, betas, decay = self.config.learning_rate, self.config.betas, self.settings.weight_decay
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)
        return torch.optim.RAdam(parameters, lr=rate, betas=betas, weight_decay=decay, decoupled_weight_decay=True)

    def describe(self) -> str:
        return f"torch with {self.settings.optimizer}, weight decay {self.settings.weight_decay:g}"
