"""P10: memory an image of the large presets, and the largest micro-batch that fits."""

from __future__ import annotations

import gc
from typing import Any

import torch

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import SMALLER, Passes, Shape, preset
from udddm.networks import activations

PRESETS: dict[str, Shape] = {
    "cifar10": (3, 32, 32),
    "ffhq-64": (3, 64, 64),
    "imagenet-64": (3, 64, 64),
    "imagenet-256-latents": (4, 32, 32),
}
MB = 1e6


def peak(made: Passes, batch: int) -> tuple[int, int]:
    """(bytes at the peak of a step, bytes of weights, moments and averages)."""
    made.resize(batch)
    made.step()
    made.engine.adam.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    fixed = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made.step()
    return torch.cuda.max_memory_allocated(), fixed


def measured(made: Passes) -> dict[str, Any]:
    """From the difference of two micro-batches."""
    (low, _), (high, fixed) = peak(made, 8), peak(made, 16)
    each = max(1.0, (high - low) / 8)
    total = torch.cuda.mem_get_info()[1]
    return {
        "mb_an_image": round(each / MB, 1),
        "fixed_mb": round(fixed / MB),
        "largest_micro_batch": int((0.95 * total - (low - 8 * each)) / each),
    }


def presets(bench: Bench) -> None:
    """What autograd keeps, and on a GPU what the allocator takes for it."""
    kept(bench)


def recomputed(bench: Bench) -> None:
    """The same with `train.recompute`."""
    kept(bench, "train.recompute=true")


def kept(bench: Bench, *settings: str) -> None:
    for name in ("cifar10",) if bench.small else PRESETS:
        config = preset(name, "train.cuda_graphs=false", *settings, *(SMALLER if bench.small else ()))
        if bench.device == "cpu":
            config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
        made = Passes(config, PRESETS[name], bench, batch=8, teacher="none", plans=1)
        train = config.train
        counted = activations.bytes_per_image(config.network, PRESETS[name], train.precision, train.recompute)
        figures: dict[str, Any] = {"kept_mb_an_image": round(counted / MB, 1)}
        bench.report(**{name: figures})
        if bench.device == "cuda":
            figures |= measured(made)
            bench.report(**{name: figures})
        del made
        gc.collect()


CHECKS = (Check("P10", "presets", 40, presets), Check("P10", "recompute", 40, recomputed))
