"""Dropout during training: its probability in each phase, and its random numbers."""

from __future__ import annotations

import torch
from torch import nn

from udddm import rng
from udddm.config import RunConfig
from udddm.errors import ConfigError
from udddm.networks.blocks import dropout_layers
from udddm.objectives import Objective
from udddm.rng import Stream


class Dropout:
    """The dropout of a network, which may differ between pretraining and the objective (`objective.pretrain_dropout`).

    The probability is an attribute of the network's layers. A change of it compiles a compiled network again, and
    captures new CUDA graphs. Both are functions of the step, so a run that resumes continues with the same.
    """

    def __init__(self, config: RunConfig, objective: Objective, network: nn.Module):
        """`network` may be wrapped, as by an engine. Raises ConfigError if its dropout cannot be changed."""
        self._seed, self._objective = config.seed, objective
        self._usual, self._pretraining = config.network.dropout, config.objective.pretrain_dropout
        self._active = bool(self._usual or self._pretraining)
        """Whether any phase draws random numbers."""
        self._layers = dropout_layers(network)
        if self._pretraining is not None:
            self._layers = [layer for layer in self._layers if layer.p == self._usual]
            if not self._layers:
                raise ConfigError(
                    f"objective.pretrain_dropout: network.name={config.network.name} has no layers torch.nn.Dropout "
                    "with the probability network.dropout; use objective.pretrain_dropout=null"
                )

    def start(self, step: int, epoch: int, rank: int) -> None:
        """Set the probability for `step` in `epoch`, and seed torch's generator if any phase has dropout.

        It is the only generator with a state; all else is a function of position.
        """
        if self._pretraining is not None:
            chosen = self._pretraining if self._objective.pretrains(epoch) else self._usual
            for layer in self._layers:
                layer.p = chosen
        if self._active:
            torch.manual_seed(rng.key(self._seed, Stream.DROPOUT, step, rank) >> 1)
