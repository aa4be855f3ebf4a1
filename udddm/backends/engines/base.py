"""The contract of an engine, which turns losses into optimizer steps. Implemented by torch (DDP) and DeepSpeed (ZeRO).

A step consists of one or more micro-batches, followed by `step`:

    with engine.micro_batch(last=True):
        with engine.autocast():
            loss = ... engine.module(...) ...
        engine.backward(loss)
    engine.step(step)

At any precision, an engine keeps float32 master weights and Adam's moments, either replicated on every rank or sharded.
`Pieces` maps each parameter to this rank's part of such a set: the full tensor, or a flat part of it. An EMA needs no
more, nor do checkpoints that any engine can load with any number of ranks (`udddm/runs/weights.py`).
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn

from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig
from udddm.errors import ConfigError

Pieces = dict[str, torch.Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slot:
    """The location of this rank's elements [start, start + numel) of a parameter, in row-major order."""

    master: torch.Tensor
    """The float32 tensor in the optimizer: the parameter itself, or the concatenated parts of several parameters."""
    offset: int
    """Index of the first element in `master`."""
    start: int
    numel: int

    def of(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A view of this slot's part of a tensor with the layout of `master`. `shape` is that of the parameter."""
        return tensor if tensor.shape == shape else tensor.view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class EngineContext:
    """The argument of an engine factory, called as `factory(context)` or `factory(context, settings)`."""

    network: nn.Module
    """The network, on the host, with its initial weights."""
    config: RunConfig
    ranks: Ranks
    total_steps: int
    """Number of steps of the run, for the schedule of the learning rate."""


class Engine(ABC):
    """Turns losses into optimizer steps. The loss calls the network as `module`.

    An engine with settings is built as `factory(context, settings)`. To change only the optimizer, derive from
    `udddm.backends.engines.ddp.TorchEngine` and override `optimizer`.
    """

    needs_process_group: ClassVar[bool] = False
    """Whether even a single rank needs a process group."""

    module: nn.Module
    adam: torch.optim.Optimizer
    """The optimizer. Its state is keyed by the masters of the slots."""

    def __init__(self, context: EngineContext):
        self.config, self.ranks, self.total_steps = context.config.train, context.ranks, context.total_steps
        self.lr_factor: Callable[[int], float] = lambda step: 1.0
        """What the scheduled learning rate of a step is multiplied by."""
        self.shapes = {name: p.shape for name, p in context.network.named_parameters()}

    @classmethod
    def check(cls, config: RunConfig, world_size: int) -> None:
        """Raise ConfigError for settings that this engine does not support. Called before anything is started."""
        return

    @property
    def equal_forward_calls(self) -> bool:
        """Whether all ranks must call `module` equally often, because the forward pass exchanges weights."""
        return False

    @property
    def static_shapes(self) -> bool:
        """Whether `module` is faster if all calls have the same number of images."""
        return False

    def describe(self) -> str:
        """The engine and its mode, for the first lines of a run's log."""
        return type(self).__name__

    # Steps.

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of the forward pass: autocast to `train.precision`."""
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, AUTOCAST[self.config.precision])

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0: linear warmup, then constant or decaying to 0, and the
        same again from `train.lr_restart` on; times `lr_factor`."""
        return self._scheduled(step) * self.lr_factor(step)

    def _scheduled(self, step: int) -> float:
        c, total = self.config, self.total_steps
        restart = round(c.lr_restart * total)
        if step >= restart:
            step, total = step - restart, total - restart
        else:
            total = restart
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        done = (step - c.warmup_steps) / max(1, total - c.warmup_steps)
        factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[c.lr_schedule]
        return c.learning_rate * factor

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """The context of the forward and backward pass of a micro-batch. `last`: it is the last one of the step."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of this rank's part of the loss.

        `loss` is the sum over the micro-batch, divided by the number of samples of the step over all ranks.
        """

    def step(self, step: int) -> None:
        """Take the optimizer step number `step`, counted from 0, with the accumulated gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer_step()

    @abstractmethod
    def optimizer_step(self) -> None:
        """Clip the accumulated gradients, update the weights, and discard the gradients."""

    def gradient_norm(self) -> float | None:
        """The norm of the gradient of the last step, over all parameters and before clipping; None if unknown.

        Called by every rank, seldom: it waits for the device.
        """
        return None

    def backward_and_step(self, loss: torch.Tensor, step: int) -> None:
        """Take a step with a single micro-batch."""
        with self.micro_batch(last=True):
            self.backward(loss)
        self.step(step)

    # Weights and optimizer state.

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """The location of this rank's part of every parameter. Parameters without a part on this rank may be absent."""

    @property
    def sharded(self) -> bool:
        """Whether ranks keep different parts of the weights and moments."""
        return False

    def weights(self) -> Pieces:
        """Views of the float32 master weights. They remain valid, and change in every step."""
        return {name: slot.of(slot.master.detach(), self.shapes[name]) for name, slot in self.slots().items()}

    def moments(self) -> dict[str, Pieces]:
        """Views of Adam's moments, by the names in MOMENTS. Zeros before the first step."""
        self._materialize()
        return {
            key: {n: s.of(self.adam.state[s.master][key], self.shapes[n]) for n, s in self.slots().items()}
            for key in MOMENTS
        }

    def _materialize(self) -> None:
        """Create the state of Adam before its first step, so that it can be read or loaded."""
        for master in {id(s.master): s.master for s in self.slots().values()}.values():
            state = self.adam.state[master]
            if "exp_avg" not in state:
                fused = master.device.type == "cuda" and self.adam.defaults.get("fused")
                where = master.device if fused else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=where)
                for key in MOMENTS:
                    state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)

    def scalars(self) -> dict[str, torch.Tensor]:
        """Adam's `step` and, in float16 training, `scaler` = [loss scale, steps since it changed]."""
        steps = [float(state["step"]) for state in self.adam.state.values() if "step" in state]
        found = {"step": torch.tensor(max(steps, default=0.0), dtype=torch.float32)}
        if self.config.precision == "fp16":
            found["scaler"] = torch.tensor(self.loss_scale(), dtype=torch.float64)
        return found

    @abstractmethod
    def loss_scale(self) -> list[float]:
        """In float16 training, [loss scale, steps since it changed]."""

    @abstractmethod
    def load_loss_scale(self, scale: float, since: int) -> None:
        """Restore the values returned by `loss_scale`."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load the weights from full tensors, by parameter name."""
        pieces = self.weights()
        for name in self.shapes:
            self.fill(pieces, name, weights[name])
        self.weights_loaded()

    def load(self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]) -> None:
        """Load the weights and the optimizer state from full tensors.

        `weights` is keyed by parameter name, `optimizer` by `exp_avg/<name>`, `exp_avg_sq/<name>`, `step` and `scaler`.
        """
        self.load_weights(weights)
        moments = self.moments()
        for name in self.shapes:
            for key in MOMENTS:
                self.fill(moments[key], name, optimizer[f"{key}/{name}"])
        for state in self.adam.state.values():
            if "step" in state:
                state["step"].fill_(float(optimizer["step"]))
        if self.config.precision == "fp16" and "scaler" in optimizer:
            scale, since = optimizer["scaler"].tolist()
            self.load_loss_scale(scale, int(since))

    def weights_loaded(self) -> None:
        """Called after the master weights were set: update the weights that the forward pass uses."""
        return

    @torch.no_grad()
    def fill(self, pieces: Pieces, name: str, whole: torch.Tensor) -> None:
        """Copy this rank's part of a full tensor into its piece."""
        if name in pieces:
            piece = pieces[name]
            if piece.shape == whole.shape:
                piece.copy_(whole)
            else:
                slot = self.slots()[name]
                piece.copy_(whole.reshape(-1)[slot.start : slot.start + slot.numel])

    @torch.no_grad()
    def whole(self, pieces: Pieces, name: str, to: int | None = None) -> torch.Tensor | None:
        """The full tensor, in float32 on the host: on rank `to` (None elsewhere), or on all ranks if `to` is None.

        Every rank must call this, in the same order.
        """
        wanted = to is None or to == self.ranks.rank
        if not self.sharded:
            return pieces[name].detach().float().cpu().contiguous() if wanted else None
        shape = self.shapes[name]
        full = torch.zeros(shape.numel(), dtype=torch.int32, device=self.ranks.device)
        if name in pieces:  # sum the bits as integers, because -0.0 + 0.0 would lose the sign
            slot = self.slots()[name]
            part = pieces[name].detach().float().contiguous().view(-1).view(torch.int32)
            full[slot.start : slot.start + slot.numel] = part.to(full.device)
        if to is None:
            dist.all_reduce(full)
        else:
            dist.reduce(full, dst=to)
        return full.view(torch.float32).view(shape).cpu() if wanted else None


def samples_a_part(config: RunConfig, world: int) -> int:
    """The number of samples of a micro-batch on one rank.

    Raises ConfigError if train.grad_accumulation does not divide the samples of a rank in a step.
    """
    rows = config.train.batch_size // world
    if rows % config.train.grad_accumulation:
        raise ConfigError(
            f"train.grad_accumulation ({config.train.grad_accumulation}) must divide the {rows} samples per rank "
            f"and step ({world} rank{'s' if world > 1 else ''}, train.batch_size={config.train.batch_size})"
        )
    return rows // config.train.grad_accumulation
