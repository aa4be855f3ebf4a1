"""The DeepSpeed engine: ZeRO 0 to 3, optimizer offload, float32, bf16 and fp16 with dynamic loss scaling.

The optimizer is always PyTorch's, even if DeepSpeed would compile its own, so that no compiler is needed.
`slots` locates this rank's part of every master weight. These locations are not part of DeepSpeed's public interface,
hence the pinned minor version.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch

from udddm.backends.engines import deepspeed_config, optimizers
from udddm.backends.engines.base import Engine, EngineContext, Slot
from udddm.config import RunConfig
from udddm.errors import ConfigError


def _import(device: torch.device) -> Any:
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine.name=deepspeed: DeepSpeed cannot be imported ({error}); pip install 'udddm[deepspeed]'"
        ) from error
    if device.type == "cpu":  # only used on CPUs; accessing the table makes DeepSpeed probe compilers and GPUs
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise it is compiled at first use
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


class DeepSpeedEngine(Engine):
    """The engine of `engine.name=deepspeed`."""

    needs_process_group = True

    @classmethod
    def check(cls, config: RunConfig, world_size: int) -> None:
        deepspeed_config.resolve(config, world_size)

    @property
    def equal_forward_calls(self) -> bool:
        return self.stage == 3

    def describe(self) -> str:
        return f"deepspeed, ZeRO {self.stage}" + (", optimizer in host memory" if self._offload else "")

    def __init__(self, context: EngineContext):
        super().__init__(context)
        network, config, ranks = context.network, context.config, context.ranks
        train, self._offload = config.train, config.engine.offload
        for name in ("compile", "cuda_graphs"):
            if getattr(train, name):
                raise ConfigError(
                    f"train.{name} is not supported with engine.name=deepspeed: set it to false, or use "
                    "engine.name=torch"
                )
        settings = deepspeed_config.resolve(config, ranks.world_size)
        deepspeed = _import(ranks.device)
        if train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError(
                f"train.precision=fp16: DeepSpeed does not support fp16 on this {ranks.device.type}; use bf16, or "
                "engine.name=torch"
            )
        self.stage = deepspeed_config.zero_stage(config)
        initial = {name: p.detach().clone() for name, p in network.named_parameters()}
        network.to(ranks.device)
        adam = optimizers.build(train, network.parameters())
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=network, optimizer=adam, config=settings)
        self._parameters = dict(network.named_parameters())
        self.module, self.adam = self._engine, self._engine.basic_optimizer
        self._last = True
        self._slots = self._find_slots()
        self.adam.state.clear()  # some wrappers have taken a step with zero gradients
        if train.precision != "fp32":  # DeepSpeed initializes the master weights from rounded weights
            pieces = self.weights()
            for name, weight in initial.items():
                self.fill(pieces, name, weight)
            self.weights_loaded()

    @property
    def sharded(self) -> bool:
        return self.stage > 0

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[object]:
        self._last = last
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss = loss * self.ranks.world_size  # DeepSpeed averages the gradients of ranks, which should be summed
        if self.stage == 0 and self.config.precision == "fp16":
            # Without ZeRO, `engine.backward` does not scale the loss, but the optimizer divides by the scale.
            loss = loss * self._scaler().cur_scale
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._last:
            self._engine.step()  # only counts the micro-batch

    def optimizer_step(self) -> None:
        self._engine.step()

    def gradient_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    # Locations of the master weights in DeepSpeed.

    def slots(self) -> dict[str, Slot]:
        return self._slots

    def _find_slots(self) -> dict[str, Slot]:
        if self.stage == 3:
            return self._slots_of_stage_3()
        if self.stage > 0:
            return self._slots_of_stages_1_and_2()
        masters = dict(self._low_precision())
        whole = {name: masters.get(id(p), p) for name, p in self._parameters.items()}
        return {name: Slot(master, 0, 0, master.numel()) for name, master in whole.items()}

    def _low_precision(self) -> list[tuple[int, torch.Tensor]]:
        """At stage 0: (id of the parameter, master weight) of every half-precision parameter."""
        low, high = getattr(self._optimizer, "fp16_groups", []), getattr(self._optimizer, "fp32_groups", [])
        return [(id(p), m) for ps, ms in zip(low, high, strict=True) for p, m in zip(ps, ms, strict=True)]

    def _slots_of_stages_1_and_2(self) -> dict[str, Slot]:
        optimizer, found = self._optimizer, {}
        flat = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                found[name] = Slot(flat[mapping.param_group_index], here.start, there.start, here.numel)
        return found

    def _slots_of_stage_3(self) -> dict[str, Slot]:
        optimizer, found = self._optimizer, {}
        for name, parameter in self._parameters.items():
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = length * self.ranks.rank
            numel = min(length, self.shapes[name].numel() - start)  # the parts of the last ranks are padded
            if numel > 0:
                found[name] = Slot(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel)
        return found

    @torch.no_grad()
    def weights_loaded(self) -> None:
        optimizer = self._optimizer
        if self.stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:  # small parameters, not sharded
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.stage > 0:
            optimizer.update_lp_params()
        else:
            masters = dict(self._low_precision())
            for parameter in self._parameters.values():
                if id(parameter) in masters:
                    parameter.copy_(masters[id(parameter)])

    def _scaler(self) -> Any:
        return getattr(self._optimizer, "loss_scaler", None) or self._optimizer.loss_scale_config

    def loss_scale(self) -> list[float]:
        """[loss scale, steps since it changed], as counted by PyTorch.

        DeepSpeed counts the steps since the last overflow, and raises the scale at multiples of the window. PyTorch
        counts the steps since the scale changed, and raises it when their number equals the window. DeepSpeed's count
        could be above the window, and would then never be equal to it.
        """
        scaler = self._scaler()
        return [scaler.cur_scale, (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window]

    def load_loss_scale(self, scale: float, since: int) -> None:
        scaler = self._scaler()
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scale, since, -1
