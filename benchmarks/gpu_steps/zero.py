"""P7: DeepSpeed's stages against the torch engine, what importing it costs, and checkpoints between the engines."""

from __future__ import annotations

import gc
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch._C._distributed_c10d import HashStore

from gpu_steps.harness import Bench, Check, Skipped
from gpu_steps.workloads import TINY_SHAPE, Passes, alone, digest, environment, gap, synchronize, timed, tiny
from udddm import networks
from udddm.backends import engines
from udddm.backends.engines.base import Engine
from udddm.config import RunConfig
from udddm.runs import weights

STAGES = {
    "zero0": "engine={name: deepspeed, zero: 0}",
    "zero1": "engine={name: deepspeed, zero: 1}",
    "zero2": "engine={name: deepspeed, zero: 2}",
    "zero3": "engine={name: deepspeed, zero: 3}",
    "zero2_offload": "engine={name: deepspeed, zero: 2, offload: true}",
}
STEPS = 20
MOMENT_LIMIT = 0.1
"""Of the largest value. Half precision moves moments by percents; a wrong loss scale makes this 1 or far more."""


def begin(bench: Bench) -> None:
    """A process group of one. Raises Skipped without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    environment(TORCH_EXTENSIONS_DIR=str(bench.scratch / "extensions"), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    backend = "cpu:gloo,cuda:nccl" if bench.device == "cuda" else "gloo"
    alone(bench)
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def built_extensions() -> list[str]:
    return [str(path) for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*.so")]


def configured(precision: str, *settings: str) -> RunConfig:
    return tiny("objective.name=chain", f"train.precision={precision}", *settings)


def state(made: Engine) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and first moments, whole, on the host."""
    weights, moments = made.weights(), made.moments()["exp_avg"]
    names = list(made.shapes)

    def whole(pieces: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name: made.whole(pieces, name) for name in names}
        return {name: value.clone() for name, value in found.items() if value is not None}  # on a CPU it is a view

    return whole(weights), whole(moments)


def one(bench: Bench, precision: str, *settings: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(figures, weights, moments) after some steps."""
    began = time.perf_counter()
    made = Passes(configured(precision, *settings), TINY_SHAPE, bench, batch=16)
    built = time.perf_counter() - began
    for _ in range(STEPS):
        made.step()
    weights, moments = state(made.engine)
    assert any(bool(moment.any()) for moment in moments.values()), "all moments are 0: no step was taken"
    taken = int(made.engine.scalars()["step"])
    timing = timed(made.step, made.device, warm=1, count=bench.pick(8, 2))
    figures: dict[str, Any] = {**timing.figures(), "building_s": round(built, 2), "steps": taken}
    if precision == "fp16":
        figures["loss_scale"] = made.engine.scalars()["scaler"].tolist()[0]
    return figures, weights, moments


def compare(bench: Bench, precision: str) -> None:
    begin(bench)
    figures, weights, moments = one(bench, precision)
    bench.report(torch=figures)
    bad: dict[str, str] = {}
    for name in bench.pick(tuple(STAGES), ("zero0", "zero2", "zero3")):
        try:
            figures, other_weights, other_moments = one(bench, precision, STAGES[name])
            figures |= {"weights": gap(other_weights, weights), "moments": gap(other_moments, moments)}
            if not figures["moments"] < MOMENT_LIMIT:
                bad[name] = f"moments differ by {figures['moments']:.2g} of the largest"
        except Exception as error:  # the other stages are to be seen too
            figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            bad[name] = figures["error"]
        bench.report(**{name: figures})
        gc.collect()
    extensions = built_extensions()
    bench.report(extensions_built=extensions)
    assert not extensions, f"DeepSpeed has compiled {extensions}"
    assert not bad, f"against the torch engine: {bad}"


def fp16(bench: Bench) -> None:
    compare(bench, "fp16")


def bf16(bench: Bench) -> None:
    compare(bench, "bf16")


def probing(bench: Bench) -> None:
    """Seconds to import DeepSpeed, and to probe which of its extensions could be built."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    environment(DS_ACCELERATOR=bench.device)
    began = time.perf_counter()
    deepspeed: Any = importlib.import_module("deepspeed")
    imported = time.perf_counter()
    bench.report(import_s=round(imported - began, 2))
    dict(deepspeed.ops.__compatible_ops__)
    bench.report(probing_s=round(time.perf_counter() - imported, 2))


def checkpoints(bench: Bench) -> None:
    """Weights and moments through torch, ZeRO 1, ZeRO 3 and torch again: the same bytes."""
    begin(bench)
    precision = bench.pick("fp16", "bf16") if bench.device == "cuda" else "bf16"
    places: list[Path] = []
    digests = []
    for number, settings in enumerate(((), (STAGES["zero1"],), (STAGES["zero3"],), ())):
        config, ranks = configured(precision, *settings), alone(bench)
        made: Engine
        if places:
            made = engines.build(networks.for_run(config, TINY_SHAPE), config, ranks, 100)
            weights.load(places[-1], made, [])
        else:
            first = Passes(config, TINY_SHAPE, bench, batch=16)
            for _ in range(STEPS):
                first.step()
            made = first.engine
        synchronize(ranks.device)
        places.append(bench.scratch / f"copy-{number}")
        places[-1].mkdir()
        weights.save(places[-1], made, [])
        digests.append([digest(found) for found in state(made)])
        bench.report(digests=digests)
    assert len({tuple(pair) for pair in digests}) == 1, "a checkpoint changed on its way between engines"


CHECKS = (
    Check("P7", "import", 30, probing),
    Check("P7", "fp16", 80, fp16, "DeepSpeed has no fp16 on a CPU"),
    Check("P7", "bf16", 80, bf16),
    Check("P7", "checkpoints", 30, checkpoints),
)
