"""P10: memory an image of the large presets, and the largest micro-batch that fits."""

from __future__ import annotations

import gc
from typing import Any

import torch

from gpu_steps.common import SMALLER, Passes, Shape, preset
from gpu_steps.harness import Bench, Check

PRESETS: dict[str, Shape] = {
    "cifar10": (3, 32, 32),
    "ffhq-64": (3, 64, 64),
    "imagenet-64": (3, 64, 64),
    "imagenet-256-latents": (4, 32, 32),
}
MB = 1e6


class Kept:
    """Bytes that a forward pass keeps for the backward pass, each storage once, parameters left out."""

    def __init__(self, network: torch.nn.Module):
        self._known = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self._alive: list[torch.Tensor] = []  # a freed storage's address would be used again
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def kept_bytes(made: Passes) -> int:
    """By counting what autograd saves; the same on every device."""
    kept = Kept(made.network)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        visits = made.visits[0]
        with made.engine.autocast():
            losses, _ = made.objective(made.engine.module, made.x0, made.state, visits, made.labels)
    del losses
    return kept.bytes


def peak(bench: Bench, name: str, batch: int) -> tuple[int, int]:
    """(bytes at the peak of a step, bytes of weights, moments and averages)."""
    made = Passes(preset(bench, name), PRESETS[name], bench, batch=batch, teacher="none", plans=1)
    made.step()
    made.engine.adam.zero_grad(set_to_none=True)
    fixed = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made.step()
    return torch.cuda.max_memory_allocated(), fixed


def measured(bench: Bench, name: str) -> dict[str, Any]:
    """From the difference of two micro-batches."""
    found = []
    for batch in (8, 16):
        found.append(peak(bench, name, batch))
        gc.collect()
        torch.cuda.empty_cache()
    (low, _), (high, fixed) = found
    each = (high - low) / 8
    total = torch.cuda.mem_get_info()[1]
    return {
        "mb_an_image": round(each / MB, 1),
        "fixed_mb": round(fixed / MB),
        "largest_micro_batch": int((total * 0.95 - (low - 8 * each)) / each),
    }


def presets(bench: Bench) -> None:
    bench.need_cuda("the allocator's peak")
    for name in ("cifar10",) if bench.small else PRESETS:
        bench.report(**{name: measured(bench, name)})


def counted(bench: Bench) -> None:
    """What autograd keeps, without the allocator's rounding."""
    for name, shape in PRESETS.items():
        settings = SMALLER if bench.small else ()
        if bench.small and name != "cifar10":
            continue
        config = preset(bench, name, *settings)
        if bench.device == "cpu":
            config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
        made = Passes(config, shape, bench, batch=8, teacher="none", plans=1)
        bench.report(**{name: {"kept_mb_an_image": round(kept_bytes(made) / 8 / MB, 1)}})
        del made
        gc.collect()


CHECKS = (Check("P10", "presets", 25, presets), Check("P10", "counted", 25, counted))
