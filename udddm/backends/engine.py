"""The torch engine: mixed precision, gradient clipping, Adam, the learning rate, and DDP over several ranks."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from udddm.backends.ranks import Ranks
from udddm.config import TrainConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """Owns the network's training form, the optimizer and the loss scaler.

    `module` is what objectives call; `network` holds the float32 weights. `total_steps` is the length of the run.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, ranks: Ranks, total_steps: int):
        self.config, self.ranks, self.total_steps = config, ranks, total_steps
        network.to(ranks.device)
        if config.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network
        self.module: nn.Module = network
        if ranks.world > 1:
            self.module = DistributedDataParallel(
                network,
                device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        if config.compile:
            self.module = torch.compile(self.module)  # type: ignore[assignment]
        self.names = [name for name, _ in network.named_parameters()]
        self.optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=config.betas, fused=True)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, _AUTOCAST[self.config.precision])

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, then constant or falling to 0 at the run's end."""
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        done = (step - c.warmup_steps) / max(1, self.total_steps - c.warmup_steps)
        factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[c.decay]
        return c.learning_rate * factor

    def backward_and_step(self, loss: torch.Tensor, step: int) -> None:
        """One optimizer step from this rank's share of the loss: the sum over its samples over the step's total."""
        if self.ranks.world > 1:
            loss = loss * self.ranks.world  # DDP averages over ranks what should be summed
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 weights by name, on the host."""
        return {name: value.detach().cpu() for name, value in self.network.state_dict().items()}

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self.network.load_state_dict(weights)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Adam's moments and step by parameter name, and the loss scale, on the host."""
        found = {}
        for name, parameter in zip(self.names, self.optimizer.param_groups[0]["params"], strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{key}/{name}"] = value.detach().cpu().contiguous()
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            found["scaler"] = torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float64)
        return found

    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `optimizer_tensors` gave. Moments get their parameter's memory format: the fused Adam walks both
        as flat memory."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        parameters = dict(self.network.named_parameters())
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if name:
                own = torch.empty_like(parameters[name]) if kind != "step" else torch.empty_like(value)
                state.setdefault(self.names.index(name), {})[kind] = own.copy_(value)
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.scaler.is_enabled() and "scaler" in tensors:
            fresh = self.scaler.state_dict()
            scale, tracker = tensors["scaler"].tolist()
            self.scaler.load_state_dict({**fresh, "scale": scale, "_growth_tracker": int(tracker)})
