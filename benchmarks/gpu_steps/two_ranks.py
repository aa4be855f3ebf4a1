"""P6: two ranks on one device, joined by gloo (NCCL refuses to give two ranks one GPU)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import TINY_SHAPE, alone, device_of, environment, gap, no_tf32, pixels, stepped, tiny
from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig

LIMIT = 1e-4
"""Of the largest weight. Adam moves a weight by its learning rate, 1e-4, where a gradient's sign is a matter of
rounding; other batch sizes use other kernels."""
STEPS = 8


def config(*settings: str) -> RunConfig:
    refined = "objective={name: ict, refined: {share: 0.5}}"
    return tiny(
        refined, "train.channels_last=true", "checkpoint.every_steps=1000000", "train.deterministic=true", *settings
    )


def on_two(bench: Bench, work: Callable[[Ranks], Any]) -> None:
    """Run `work` on two forked ranks. This process must not have used CUDA. Raises when a rank fails."""
    meeting = bench.scratch / f"meet-{time.monotonic_ns()}"
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            _rank(bench, rank, meeting, work)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(codes):
        raise AssertionError(f"the ranks ended with exit codes {codes}; their errors are in the output below")


def _rank(bench: Bench, rank: int, meeting: Path, work: Callable[[Ranks], Any]) -> None:
    """A forked rank. Does not return."""
    code = 1
    try:
        torch.set_num_threads(1)
        environment(CUBLAS_WORKSPACE_CONFIG=":4096:8")
        device = device_of(bench)
        backend = "cpu:gloo,cuda:gloo" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
        )
        ranks = Ranks(rank, 2, device, rank)
        work(ranks)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a group that ends in the usual way may wait for a rank that has failed


def train_and_keep(bench: Bench, run: str, stops: tuple[int, ...], *settings: str) -> dict[str, torch.Tensor]:
    """Train on two ranks up to each of `stops`, in new processes each. The first rank's weights."""
    result = bench.scratch / f"{run}.pt"
    (bench.scratch / run).mkdir(exist_ok=True)

    def work(ranks: Ranks, stop: int) -> None:
        no_tf32()
        warnings.simplefilter("always")
        found = stepped(config(*settings), pixels(128, TINY_SHAPE), bench.scratch / run, ranks, stop)
        if ranks.is_rank_zero:
            torch.save({name: found[name] for name in ("weights", "resumed_at")}, result)

    for stop in stops:
        on_two(bench, lambda ranks, stop=stop: work(ranks, stop))  # type: ignore[misc]
    saved = torch.load(result)
    if len(stops) > 1 and saved["resumed_at"] != stops[-2]:
        raise AssertionError(f"the second start began at step {saved['resumed_at']}, not at {stops[-2]}")
    weights: dict[str, torch.Tensor] = saved["weights"]
    return weights


def starts(bench: Bench) -> None:
    """DDP starts; 8 steps, and 4, a resume and 4, equal one rank's; so do two micro-batches a step, and CUDA graphs."""
    more: dict[str, tuple[str, ...]] = {"two": (), "accumulated": ("train.grad_accumulation=2",)}
    if bench.device == "cuda":
        more["graphs"] = ("train.cuda_graphs=true",)
        more["graphs_accumulated"] = ("train.cuda_graphs=true", "train.grad_accumulation=2")
    found = {name: train_and_keep(bench, name, (STEPS,), *settings) for name, settings in more.items()}
    found["resumed"] = train_and_keep(bench, "resumed", (STEPS // 2, STEPS))
    no_tf32()
    one = stepped(config(), pixels(128, TINY_SHAPE), bench.scratch / "one", alone(bench), STEPS)["weights"]
    gaps = {name: gap(weights, one) for name, weights in found.items()}
    equal = gap(found["resumed"], found["two"]) == 0
    bench.report(largest_difference=gaps, resumed_to_the_bit=equal)
    bad = {name: value for name, value in gaps.items() if not value < LIMIT}
    assert not bad, f"weights differ from one rank's by {LIMIT:g} or more: {bad}"
    assert equal, "a resumed run differs from an undisturbed one in deterministic mode"
    with contextlib.suppress(OSError):
        text = bench.log.read_text(errors="replace")
        assert "strides do not match" not in text, "DDP warns that gradients and buckets have other strides"


CHECKS = (Check("P6", "two_ranks", 100, starts),)
