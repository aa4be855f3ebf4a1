"""The torch engine: autocast, gradient clipping, fused Adam, and DDP. Every rank keeps the full weights and moments."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines import optimizers
from udddm.backends.engines.base import MOMENTS, Engine, EngineContext, Pieces, Slot
from udddm.backends.engines.graphs import GraphedNetwork
from udddm.config import NetworkConfig, RunConfig, TrainConfig
from udddm.errors import ConfigError


def _same_strides(parameter: nn.Parameter) -> None:
    """Give gradients the strides of a weight whose memory is the same in both formats, such as that of one channel.

    DDP warns, and copies gradients, where their strides differ from the weight's.
    """
    both = (torch.contiguous_format, torch.channels_last)
    if parameter.dim() == 4 and all(parameter.is_contiguous(memory_format=each) for each in both):
        shape, strides = parameter.shape, parameter.stride()
        parameter.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradient.contiguous().as_strided(shape, strides)
        )


def channels_last(train: TrainConfig, device: torch.device) -> bool:
    """Whether the network's memory format is channels last: `train.channels_last`, or what is faster.

    PyTorch's group normalization on GPUs copies channels-last images to channels first and back (docs/gpu.md).
    """
    return train.compile or device.type != "cuda" if train.channels_last is None else train.channels_last


def cuda_graphs(config: RunConfig, ranks: Ranks) -> bool:
    """Whether the network is called through CUDA graphs: `train.cuda_graphs`, or where it was tested."""
    train = config.train
    if ranks.device.type != "cuda" or train.cuda_graphs is not None:
        return ranks.device.type == "cuda" and bool(train.cuda_graphs)
    plain = not train.compile and not train.deterministic and train.grad_accumulation == 1
    return plain and ranks.world_size == 1 and config.network.name == NetworkConfig.model_fields["name"].default


class TorchEngine(Engine):
    """The engine of `engine.name=torch`."""

    def __init__(self, context: EngineContext):
        super().__init__(context)
        network, config, ranks = context.network, context.config.train, context.ranks
        network.to(ranks.device)
        if channels_last(config, ranks.device):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parameters = dict(network.named_parameters())
        self.module = network
        graphs = cuda_graphs(context.config, ranks)
        self._graphs = graphs
        if graphs:
            inner = torch.compile(network) if config.compile else network
            copy = config.grad_accumulation > 1  # gradients that are added up must not share memory with the next
            required = config.cuda_graphs is not None
            self.module = GraphedNetwork(inner, copy_gradients=copy, required=required)  # type: ignore[arg-type]
        self._ddp: DistributedDataParallel | None = None
        if ranks.world_size > 1:
            for parameter in self._parameters.values():
                _same_strides(parameter)
            # No device_ids: inputs are on the device already, and with device_ids DDP rejects the call without inputs
            # in `_settle_buckets`.
            self.module = self._ddp = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self._settle_buckets(self._ddp)
        if config.compile and not graphs:
            self.module = torch.compile(self.module)  # type: ignore[assignment]
        self.adam = self.optimizer(list(self._parameters.values()))
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self._begun = False
        self._clipped: torch.Tensor | None = None
        """The norm of the last step's gradient, if it was clipped."""

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Create the optimizer of the parameters. Its learning rate is set before every step.

        Subclasses may override this. Its state must be that of Adam (`exp_avg`, `exp_avg_sq`, `step`), because
        checkpoints hold no other state.
        """
        return optimizers.build(self.config, parameters)

    def describe(self) -> str:
        return "torch"

    @property
    def static_shapes(self) -> bool:
        return self._graphs or self.config.compile

    @classmethod
    def check(cls, config: RunConfig, world_size: int) -> None:
        chosen = config.engine
        if chosen.zero is not None or chosen.offload or chosen.deepspeed:
            raise ConfigError(
                "engine.zero, engine.offload and engine.deepspeed need engine.name=deepspeed (--engine deepspeed): "
                "select it, or remove them"
            )

    def _settle_buckets(self, ddp: DistributedDataParallel) -> None:
        """Run a first backward pass, of the sum of all parameters, so that the buckets of DDP do not change later.

        DDP rearranges its buckets after the first backward pass, in the order in which gradients arrived. With more
        than two ranks, their arrangement affects the rounding of sums. It must therefore not change after the first
        step, which is a different step in a resumed run.
        """
        network = ddp.module
        network.forward = lambda: torch.stack([p.sum() for p in self._parameters.values()]).sum()
        ddp().backward()
        del network.forward
        network.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        if not self._begun:
            self.adam.zero_grad(set_to_none=True)
            self._begun = True
        if self.ranks.world_size > 1:
            loss = loss * self.ranks.world_size  # DDP averages the gradients of ranks, which should be summed
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def optimizer_step(self) -> None:
        self._clipped = None
        if self.config.grad_clip is not None:
            self.scaler.unscale_(self.adam)
            self._clipped = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.grad_clip)
        self.scaler.step(self.adam)
        self.scaler.update()
        self._begun = False

    def gradient_norm(self) -> float | None:
        if self._clipped is not None:
            return float(self._clipped)
        # Kept until the next step, and no longer scaled: the step of the scaler, or of a fused optimizer, divides them.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None

    def moments(self) -> dict[str, Pieces]:
        """Views of Adam's moments.

        Raises ConfigError for an optimizer with any other state, which would be missing in checkpoints.
        """
        kept = {key for state in self.adam.state.values() for key in state}
        if other := sorted(kept - {"step", *MOMENTS}):
            raise ConfigError(
                f"engine {self.describe()}: its optimizer keeps {', '.join(other)}, which checkpoints do not hold; "
                f"use one whose state is step, {' and '.join(MOMENTS)}, such as Adam, AdamW or RAdam"
            )
        return super().moments()

    def slots(self) -> dict[str, Slot]:
        return {name: Slot(p, 0, 0, p.numel()) for name, p in self._parameters.items()}

    def loss_scale(self) -> list[float]:
        state = self.scaler.state_dict()
        return [state["scale"], state["_growth_tracker"]]

    def load_loss_scale(self, scale: float, since: int) -> None:
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": since})
