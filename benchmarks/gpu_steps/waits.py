"""P3: a training step that never waits for the device, and how far the host runs ahead."""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import TINY_SHAPE, alone, pixels, running, synchronize, timed, tiny
from udddm.config import RunConfig

STORES = ("gpu", "pinned", "zarr")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
"""Operators whose result the host must have, which on a GPU it waits for."""


class Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators of the main thread that would wait for a GPU, where there is none to ask."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITING or by_mask:
            self.found.append(f"{name}: {_place()}")
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of the project in the stack."""
    ours = [f for f in traceback.extract_stack() if "/udddm/" in f.filename]
    return f"{ours[-1].filename.rsplit('/udddm/')[-1]}:{ours[-1].lineno} {ours[-1].line}" if ours else "?"


@contextmanager
def noted(device: torch.device) -> Iterator[list[str]]:
    """What waits for the device on this thread."""
    if device.type != "cuda":
        with Refuse() as mode:
            yield mode.found
        return
    found: list[str] = []
    main = threading.current_thread()

    def show(message: Warning | str, category: type[Warning], filename: str, *more: object) -> None:
        if threading.current_thread() is main and "called a synchronizing" in str(message):
            found.append(f"{_place()}: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def one_store(bench: Bench, config: RunConfig, store: str) -> dict[str, Any]:
    chosen = config.model_copy(update={"store": config.store.model_copy(update={"kind": store})})
    ranks = alone(bench)
    steps = bench.pick(10, 2)
    with running(chosen, pixels(512, TINY_SHAPE), bench.scratch / store, ranks) as (trainer, inputs):
        for _ in range(bench.pick(3, 1)):
            trainer.train_step(inputs)
        synchronize(ranks.device)
        with noted(ranks.device) as found:
            for _ in range(steps):
                trainer.train_step(inputs)
        timing = timed(lambda: trainer.train_step(inputs), ranks.device, warm=0, count=steps)
        return {**timing.figures(), "waits": sorted(set(found))[:5], "count": len(found)}


def check(bench: Bench, precision: str, *settings: str) -> None:
    config = tiny(f"train.precision={precision}", "objective={name: ict, refined: {share: 0.5}}", *settings)
    figures: dict[str, Any] = {}
    for store in STORES if bench.device == "cuda" or precision != "fp16" else STORES[1:2]:  # which a CPU emulates
        figures[store] = one_store(bench, config, store)
        bench.report(**figures)
    bad = {store: found["waits"] for store, found in figures.items() if found["count"]}
    assert not bad, f"the main thread waits for the device: {bad}"


def bf16(bench: Bench) -> None:
    check(bench, "bf16")


def fp16(bench: Bench) -> None:
    """With clipping, which on a host would need the norm."""
    check(bench, "fp16", "train.grad_clip=1.0")


def graphs(bench: Bench) -> None:
    """Through CUDA graphs, which are captured while the threads of the store use the device."""
    check(bench, "bf16", "train.cuda_graphs=true")


CHECKS = (
    Check("P3", "bf16", 30, bf16),
    Check("P3", "fp16_clip", 30, fp16),
    Check("P3", "graphs", 30, graphs, "CUDA graphs"),
)
