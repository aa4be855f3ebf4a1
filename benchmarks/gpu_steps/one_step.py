"""P2: a step on the device against the same step on a CPU, gradients in half precision, dropout masks, noise."""

from __future__ import annotations

import torch
from torch import nn

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import (
    TINY,
    TINY_SHAPE,
    Passes,
    alone,
    device_of,
    environment,
    gap,
    no_tf32,
    pixels,
    stepped,
    tiny,
)
from udddm import rng
from udddm.config import load_config

OBJECTIVES = ("chain", "uddm", "ict", "ect", "edm")
LOSS_LIMIT = 1e-4
WEIGHT_LIMIT = 1e-4
"""Of the largest weight: Adam moves a weight by up to its learning rate where rounding decides a gradient's sign."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "dit": ("network={name: dit, settings: {width: 32, depth: 2, heads: 2}, condition: none, classes: 10}",),
    "ddpmpp": ("network={name: ddpmpp, base_channels: 32, channel_mult: [1, 2], condition: none, dropout: 0.1}",),
    "pretrain_dropout": ("objective.pretrain=0.5", "objective.pretrain_dropout=0.3", "train.steps=8"),
    "recompute": ("train.recompute=true", "network.dropout=0.1"),
    "guidance": ("objective.guidance=2", "network.classes=10", "network.label_dropout=0.2"),
    "refined": ("objective.refined={share: 0.5, above: 0}", "store.kind=pinned"),
    "recurrent": (
        "network.condition=channels",
        "objective={name: ict, refined: {use: condition, share: 0.5, above: 0}}",
    ),
}
"""Networks and objectives that change what a step's graph holds, or the number of its rows."""
OWN_SIZES = ("dit", "ddpmpp")
"""Networks that do not use the sizes of the U-Net."""


def trained(bench: Bench, name: str, steps: int) -> list[float]:
    """The losses of the first steps, in float32."""
    settings = [f"objective.name={name}"]
    if name == "uddm":
        settings.append("network.condition=cross-attention")
    made = Passes(tiny(*settings), TINY_SHAPE, bench, batch=16, teacher="none" if name == "edm" else "planned")
    return [float(made.step()) for _ in range(steps)]


def losses(bench: Bench) -> None:
    """All five objectives, float32 without TF32."""
    no_tf32()
    torch.set_num_threads(1)  # of a network this small, more threads make a CPU's step longer
    steps = bench.pick(10, 3)
    on_cpu = Bench("cpu", bench.small, bench.root, bench.scratch)
    worst: dict[str, float] = {}
    for name in OBJECTIVES:
        here, there = trained(bench, name, steps), trained(on_cpu, name, steps)
        worst[name] = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(here, there, strict=True))
        bench.report(largest_difference=dict(worst), steps=steps)
    bad = {name: value for name, value in worst.items() if not value < LOSS_LIMIT}
    assert not bad, f"losses differ from the CPU's by {LOSS_LIMIT:g} or more: {bad}"


def gradients(bench: Bench) -> None:
    """In half precision, in a step with a teacher's pass, every parameter gets a finite gradient."""
    counts = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        made = Passes(tiny("objective.name=ict"), TINY_SHAPE, bench, batch=16)
        visits = made.visits[0]
        assert len(visits.teacher_rows), "this batch has no teacher's pass: the check shows nothing"
        with torch.autocast(made.device.type, dtype):
            found, _ = made.losses(visits)
        (found.mean() * (256 if precision == "fp16" else 1)).backward()  # type: ignore[no-untyped-call]
        named = list(made.network.named_parameters())
        without = [name for name, p in named if p.grad is None]
        infinite = [name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())]
        counts[precision] = {"parameters": len(named), "without": len(without), "not_finite": len(infinite)}
        bench.report(gradients=dict(counts), teacher_rows=len(visits.teacher_rows))
        assert not without, f"{precision}: no gradient for {without[:5]}"
        assert not infinite, f"{precision}: gradient not finite for {infinite[:5]}"


def shared_rows(bench: Bench, teacher: str) -> tuple[int, int, int]:
    """(rows with a teacher's pass, rows that drop the same units in the first layer, and in the last)."""
    config = tiny("objective.name=ict", "network.dropout=0.5")
    made = Passes(config, TINY_SHAPE, bench, batch=32, teacher=teacher)
    made.network.train()
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen.setdefault(name, []).append((output == 0).flatten(1).cpu())

        dict(made.network.named_modules())[name].register_forward_hook(hook)

    for name, module in made.network.named_modules():
        if "Dropout" in type(module).__name__:
            keep(name)
    made.passes()
    rows = made.visits[0].teacher_rows.cpu()
    shared = []
    for first, second in seen.values():
        teachers = first[rows] if len(first) == len(second) else first[: len(rows)]
        shared.append(int((teachers == second[rows]).all(1).sum()))
    assert shared, "the network has no dropout layer: the check shows nothing"
    return len(rows), shared[0], shared[-1]


def masks(bench: Bench) -> None:
    """The teacher drops the units that the trained pass drops (Song & Dhariwal 2023, section 3.2)."""
    found = {teacher: shared_rows(bench, teacher) for teacher in ("full", "planned")}
    bench.report(teacher_rows_and_shared_first_and_last=found)
    for teacher, (rows, *shared) in found.items():
        assert min(shared) == rows, f"{teacher}: of {rows} rows, {shared} share their first and last masks"


def normals(bench: Bench) -> None:
    """rng.normal on the device against the CPU. A last bit may differ: logarithm and cosine are other code."""
    keys = rng.as_tensor(rng.keys(0, rng.Stream.NOISE, torch.arange(bench.pick(1024, 16)).numpy()))
    wanted = rng.normal(keys, (3, 32, 32))
    found = rng.normal(keys.to(device_of(bench)), (3, 32, 32)).cpu()
    other = found.view(torch.int32) != wanted.view(torch.int32)
    largest = float((found - wanted).abs().max())
    bench.report(share_of_differing_bits=float(other.double().mean()), largest_difference=largest)
    assert largest <= 1e-6, f"the device's normal numbers differ from the CPU's by up to {largest:.2g}"


def graphs(bench: Bench) -> None:
    """Steps through CUDA graphs against the same steps without: a teacher's pass, dropout."""
    no_tf32()
    found: dict[str, float] = {}
    for precision, limit in (("fp32", LOSS_LIMIT), ("bf16", 0.05), ("fp16", 0.05)):
        series: dict[bool, list[float]] = {}
        for graphed in (False, True):
            settings = (f"train.cuda_graphs={graphed}", f"train.precision={precision}", "network.dropout=0.3")
            made = Passes(tiny("objective.name=ict", *settings), TINY_SHAPE, bench, batch=16, teacher="full")
            series[graphed] = []
            for step in range(bench.pick(10, 3)):
                torch.manual_seed(step)
                series[graphed].append(float(made.step()))
        pairs = zip(series[True], series[False], strict=True)
        found[precision] = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
        bench.report(largest_difference=dict(found))
        assert found[precision] < limit, f"{precision}: losses with CUDA graphs differ by {found[precision]:.2g}"


def variants(bench: Bench) -> None:
    """Other networks and objectives: 8 steps of the trainer through CUDA graphs end where they do without."""
    environment(CUBLAS_WORKSPACE_CONFIG=":4096:8")
    no_tf32()
    gaps: dict[str, float] = {}
    for name, settings in VARIANTS.items():
        ends: list[dict[str, torch.Tensor]] = []
        for graphed in (False, True) if bench.device == "cuda" else (False, False):
            common = ("objective.name=ict", "train.deterministic=true", *settings, f"train.cuda_graphs={graphed}")
            config = load_config(None, [*TINY[1:], *common]) if name in OWN_SIZES else tiny(*common)
            data, where = pixels(64, TINY_SHAPE, classes=10), bench.scratch / f"{name}-{len(ends)}"
            ends.append(stepped(config, data, where, alone(bench), 8)["weights"])
        gaps[name] = gap(ends[1], ends[0])
        bench.report(largest_difference=dict(gaps))
    bad = {name: value for name, value in gaps.items() if not value < WEIGHT_LIMIT}
    assert not bad, f"weights differ by {WEIGHT_LIMIT:g} or more through CUDA graphs: {bad}"


CHECKS = (
    Check("P2", "losses", 60, losses),
    Check("P2", "gradients", 15, gradients),
    Check("P2", "masks", 15, masks),
    Check("P2", "noise", 10, normals),
    Check("P2", "graphs", 40, graphs, "CUDA graphs"),
    Check("P2", "variants", 60, variants),
)
