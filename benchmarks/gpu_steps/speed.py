"""P5: training speed of the preset cifar10: eager, by layout, teacher and precision, compiled, and two peers."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from gpu_steps import peers
from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import (
    SMALLER,
    Passes,
    Shape,
    Timing,
    device_of,
    no_tf32,
    parameters,
    preset,
    synchronize,
    timed,
)
from udddm.networks import blocks

SHAPE: Shape = (3, 32, 32)
GIB = 1 << 30


def built(bench: Bench, *settings: str, batch: int | None = None, teacher: str = "planned", plans: int = 4) -> Passes:
    config = preset("cifar10", *(SMALLER if bench.small else ()), "train.cuda_graphs=false", *settings)
    if bench.device == "cpu" and config.train.precision == "fp16":
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    count = batch or bench.pick(128, 8)
    return Passes(config, SHAPE, bench, batch=count, teacher=teacher, plans=plans)


def measured(bench: Bench, made: Passes) -> dict[str, Any]:
    """Images a second of eager or compiled steps; raises where a loss is not finite."""
    if made.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timing: Timing = timed(made.step, made.device, warm=bench.pick(3, 1), count=bench.pick(12, 2))
    loss = float(made.step())
    assert torch.isfinite(torch.tensor(loss)), f"the loss is {loss}"
    found: dict[str, Any] = {"images_per_s": timing.rate(made.batch), **timing.figures()}
    if made.device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    return found


def dropped() -> None:
    """Return the memory of what a caller has let go."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def layouts(bench: Bench) -> None:
    """Eager, without a teacher's pass: channels_last and NCHW, as configured and in bf16."""
    for channels_last in (True, False):
        for precision in ("fp16", "bf16"):
            made = built(bench, f"train.channels_last={channels_last}", f"train.precision={precision}", teacher="none")
            name = f"{'channels_last' if channels_last else 'nchw'}_{precision}"
            bench.report(**{name: measured(bench, made)}, parameters=parameters(made.network))
            del made
            dropped()
    norm = type(blocks.group_norm(32))
    bench.report(group_norm=f"{norm.__module__}.{norm.__qualname__}")


def teachers(bench: Bench) -> None:
    """Eager: no teacher's pass, also with `train.recompute`, one on the rows that the objective plans (without dropout,
    which may ask for all rows), and one on all rows."""
    made = built(bench, "train.recompute=true", teacher="none")
    bench.report(none_recomputed=measured(bench, made))
    del made
    dropped()
    for teacher, dropout in (("none", ""), ("planned", "0"), ("full", "")):
        made = built(bench, *([f"network.dropout={dropout}"] if dropout else []), teacher=teacher)
        bench.report(**{teacher: {**measured(bench, made), "teacher_rows": made.evaluated()}})
        del made
        dropped()


def float32(bench: Bench) -> None:
    """float32, with true float32 everywhere, as torch is set up (TF32 in convolutions), and TF32 in products too."""
    device = device_of(bench)
    for name, convolutions, products in (("none", False, False), ("convolutions", True, False), ("all", True, True)):
        if device.type != "cuda" and name != "none":
            continue
        no_tf32()
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
        made = built(bench, "train.precision=fp32", teacher="none")
        bench.report(**{f"tf32_{name}": measured(bench, made)})
        del made
        dropped()


def large_batch(bench: Bench) -> None:
    """Four times the batch."""
    made = built(bench, batch=bench.pick(512, 16), teacher="none")
    bench.report(batch=made.batch, **measured(bench, made))


def profile(bench: Bench) -> None:
    """One step: launches, kernels, and those that take the most time."""
    from torch.profiler import ProfilerActivity

    made = built(bench)
    for _ in range(bench.pick(4, 1)):
        made.step()
    synchronize(made.device)
    cuda = made.device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        made.step()
        synchronize(made.device)
    times: dict[str, list[float]] = {}
    for event in recorded.events() or []:
        on_device = str(event.device_type).endswith("CUDA")
        if on_device == cuda and not event.name.startswith("ProfilerStep"):
            spent = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            times.setdefault(event.name, []).append(spent / 1000)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    bench.report(
        kernels=sum(len(v) for v in times.values()),
        busy_ms=round(sum(sum(v) for v in times.values()), 2),
        top=[[name[:120], len(v), round(sum(v), 3)] for name, v in ordered[:15]],
    )


def others(bench: Bench) -> None:
    """The bare loop on our network, and diffusers' UNet2DModel of as many parameters: batch, precision and
    dropout the same."""
    made = built(bench, teacher="none")
    ours = parameters(made.network)
    bench.report(ours={**measured(bench, made), "parameters": ours})
    network, batch, precision = made.network, made.batch, made.config.train.precision
    dropout = made.config.network.dropout
    loop = peers.BareLoop(network, SHAPE, made.device, batch, precision)
    timing = timed(loop.step, made.device, warm=bench.pick(3, 1), count=bench.pick(12, 2))
    bench.report(bare_loop={"images_per_s": timing.rate(batch), **timing.figures()})
    del made, loop, network
    dropped()
    other = peers.diffusers_network(ours, bench.small, dropout)
    if isinstance(other, str):
        bench.report(diffusers=other)
        return
    device = device_of(bench)
    loop = peers.BareLoop(other.to(device), SHAPE, device, batch, precision)
    timing = timed(loop.step, device, warm=bench.pick(3, 1), count=bench.pick(12, 2))
    bench.report(diffusers={"images_per_s": timing.rate(batch), **timing.figures(), "parameters": parameters(other)})


def graphs(bench: Bench) -> None:
    """CUDA graphs, which the time to launch kernels does not limit: layouts and precisions, a larger batch, a teacher's
    pass on all rows."""
    variants: dict[str, tuple[tuple[str, ...], str, int]] = {
        "channels_last_fp16": (("train.channels_last=true",), "none", 128),
        "nchw_fp16": (("train.channels_last=false",), "none", 128),
        "nchw_fp16_teacher": (("train.channels_last=false",), "full", 128),
        "nchw_fp32": (("train.channels_last=false", "train.precision=fp32"), "none", 128),
        "channels_last_fp16_batch_512": (("train.channels_last=true",), "none", 512),
        "nchw_fp16_batch_512": (("train.channels_last=false",), "none", 512),
    }
    for name, (settings, teacher, batch) in variants.items():
        made = built(bench, *settings, "train.cuda_graphs=true", teacher=teacher, batch=batch)
        bench.report(**{name: measured(bench, made)})
        del made
        dropped()


def compiled(bench: Bench) -> None:
    """As configured, and `train.compile`: the time that compiling takes, and the speed after it, without a teacher's
    pass and then with one on all rows, which is compiled too."""
    made = built(bench, "train.compile=true", teacher="full")
    planned = made.visits
    made.without_teacher()
    for name in ("none", "full"):
        began = time.perf_counter()
        made.step()
        synchronize(made.device)
        spent = round(time.perf_counter() - began, 1)
        bench.report(**{name: {"compile_s": spent}})
        bench.report(**{name: {"compile_s": spent, **measured(bench, made)}})
        made.visits = planned
    del made
    dropped()
    made = built(bench, "train.compile=true", "train.cuda_graphs=true", teacher="none")
    began = time.perf_counter()
    made.step()
    synchronize(made.device)
    spent = round(time.perf_counter() - began, 1)
    bench.report(none_with_graphs={"compile_s": spent, **measured(bench, made)})


def compiled_peer(bench: Bench) -> None:
    """diffusers' network, compiled."""
    made = built(bench, batch=8, plans=1)
    other = peers.diffusers_network(parameters(made.network), bench.small, made.config.network.dropout)
    del made
    dropped()
    if isinstance(other, str):
        bench.report(diffusers=other)
        return
    device, batch = device_of(bench), bench.pick(128, 8)
    other.to(device)
    loop = peers.BareLoop(other, SHAPE, device, batch, "fp16", compiled=True)
    began = time.perf_counter()
    loop.step()
    synchronize(device)
    bench.report(compile_s=round(time.perf_counter() - began, 1))
    timing = timed(loop.step, device, warm=3, count=12)
    bench.report(images_per_s=timing.rate(batch), **timing.figures(), parameters=parameters(other))


CHECKS = (
    Check("P5", "layouts", 30, layouts),
    Check("P5", "teachers", 25, teachers),
    Check("P5", "float32", 25, float32),
    Check("P5", "large_batch", 20, large_batch),
    Check("P5", "profile", 20, profile),
    Check("P5", "peers", 40, others),
    Check("P5", "graphs", 50, graphs, "CUDA graphs"),
    Check("P5", "compiled", 110, compiled, "compiling the network takes minutes on a CPU"),
)
LAST = (Check("P5", "compiled_peer", 90, compiled_peer, "compiling the network takes minutes on a CPU"),)
"""After everything else: where time is short, it is what one can do without."""
