"""P4: the same bits twice, and after a resume; as torch is set up, and in its deterministic mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import Shape, alone, device_of, environment, has_setting, no_tf32, pixels, stepped, tiny
from udddm.config import RunConfig

SHAPE: Shape = (3, 32, 32)


def deterministic() -> None:
    """Torch's own switches. CUBLAS_WORKSPACE_CONFIG is read when CUDA starts."""
    environment(CUBLAS_WORKSPACE_CONFIG=":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def config(bench: Bench, precision: str, mode: str, *more: str) -> RunConfig:
    settings = [
        f"network.base_channels={bench.pick(64, 32)}",
        "network.attention_resolutions=[16]",
        "network.dropout=0.1",
        "objective={name: ict, refined: {share: 0.5}}",
        f"train.batch_size={bench.pick(64, 8)}",
        f"train.precision={precision}",
        "checkpoint.every_steps=1000000",
    ]
    if mode == "deterministic" and has_setting("deterministic"):
        settings.append("train.deterministic=true")
    return tiny(*settings, *more)


def twice(bench: Bench, precision: str, mode: str, *more: str) -> dict[str, Any]:
    """12 steps, 12 steps again, and 6, a resume and 6."""
    chosen, half = config(bench, precision, mode, *more), bench.pick(6, 2)
    dataset, ranks = pixels(bench.pick(640, 64), SHAPE), alone(bench)
    runs = {"first": (2 * half,), "second": (2 * half,), "resumed": (half, 2 * half)}
    found: dict[str, Any] = {}
    for name, stops in runs.items():
        for stop in stops:
            found[name] = stepped(
                chosen, dataset, bench.scratch / f"{precision}-{mode}-{len(more)}-{name}", ranks, stop
            )
    assert found["resumed"]["resumed_at"] == half, "the resumed run began anew"
    first = found["first"]["digests"]
    return {
        "repeats": found["second"]["digests"] == first,
        "resumes": found["resumed"]["digests"] == first,
        "step_ms": found["second"]["step_ms"],
        "other": sorted(k for k in first if {found[n]["digests"][k] for n in ("second", "resumed")} != {first[k]}),
    }


def modes(bench: Bench, mode: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for precision in bench.pick(("fp32", "fp16"), ("fp32",) if mode == "as_it_is" else ("bf16",)):
        found[precision] = twice(bench, precision, mode)
        bench.report(**found)
    if bench.device == "cuda":
        found["fp16_graphs"] = twice(bench, "fp16", mode, "train.cuda_graphs=true")
        bench.report(**found)
    return found


def as_it_is(bench: Bench) -> None:
    """What torch's defaults give. No result is a failure: nothing is promised."""
    modes(bench, "as_it_is")


def in_deterministic_mode(bench: Bench) -> None:
    deterministic()
    found = modes(bench, "deterministic")
    bad = {precision: one["other"] for precision, one in found.items() if not (one["repeats"] and one["resumes"])}
    assert not bad, f"not the same bits in deterministic mode: {bad}"


def attend(tokens: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the three gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, 4, tokens, 64)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v)
    out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad]


def attention(bench: Bench) -> None:
    """Flash attention alone: above some number of tokens its backward pass adds with atomics."""
    device = device_of(bench)
    no_tf32()
    environment(CUBLAS_WORKSPACE_CONFIG=":4096:8")
    found: dict[str, Any] = {}
    for mode in ("as_it_is", "deterministic"):
        if mode == "deterministic":
            deterministic()
        for tokens in bench.pick((256, 1024), (64,)):
            first = attend(tokens, device, torch.bfloat16)
            equal = [
                all(torch.equal(a, b) for a, b in zip(first, attend(tokens, device, torch.bfloat16), strict=True))
                for _ in range(bench.pick(5, 1))
            ]
            found[f"{mode}_{tokens}_tokens_equal"] = all(equal)
            bench.report(**found)
    bad = [name for name, equal in found.items() if name.startswith("deterministic") and not equal]
    assert not bad, f"not the same bits in deterministic mode: {bad}"


CHECKS = (
    Check("P4", "as_it_is", 60, as_it_is),
    Check("P4", "deterministic", 60, in_deterministic_mode),
    Check("P4", "attention", 15, attention),
)
