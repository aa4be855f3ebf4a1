"""P0: what the machine is, and what its arithmetic and memory reach."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import device_of, synchronize, timed

PACKAGES = ("torch", "numpy", "zarr", "pydantic", "deepspeed", "diffusers", "pytest", "hypothesis", "triton")
GIB = 1 << 30


def versions(bench: Bench) -> None:
    """Versions, the device's properties, and whether autocast keeps casts made without gradients."""
    device = device_of(bench)
    bench.report(python=platform.python_version(), packages=installed(), cores=os.cpu_count())
    if bench.device == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info()
        bench.report(
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(total / GIB, 1),
            free_gib=round(free / GIB, 1),
            driver=driver(),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            attention_in_half=attention_backends(device),
        )
    bench.report(autocast_keeps_gradients=autocast_keeps_gradients(device))


def installed() -> dict[str, str]:
    """Versions of the packages that decide what can be measured."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def driver() -> str:
    """The driver's version, or "" where /proc does not tell."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return ""
    found = re.search(r"\d+\.\d+[.\d]*", first)
    return found[0] if found else first


def autocast_keeps_gradients(device: torch.device) -> bool:
    """False where autocast hands the cast of a weight that was made under no_grad to a pass that needs its gradient,
    as torch 2.10 and older do (https://github.com/pytorch/pytorch/pull/165068)."""
    layer = torch.nn.Linear(8, 8, device=device)
    x = torch.ones(2, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            layer(x)
        y = layer(x)
    if not y.requires_grad:
        return False
    y.float().sum().backward()
    return layer.weight.grad is not None


def attention_backends(device: torch.device) -> list[str]:
    """The kernels of scaled_dot_product_attention that accept bf16 heads of 64."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(2, 4, 256, 64, device=device, dtype=torch.bfloat16)
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
        except RuntimeError:
            continue
        found.append(backend.name.lower())
    return found


def throughput(bench: Bench) -> None:
    """A matrix product, and a copy on the device."""
    device = device_of(bench)
    side = bench.pick(8192, 512)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    spent = timed(lambda: a @ b, device, warm=3, count=10).device_ms
    bench.report(matmul_bf16_tflops=round(2 * side**3 / spent / 1e9, 2), matmul_side=side)
    size = bench.pick(GIB, 1 << 24)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = timed(lambda: target.copy_(source), device, warm=2, count=10).device_ms
    bench.report(device_copy_gb_per_s=round(2 * size / spent / 1e6, 1))


def host_copies(bench: Bench) -> None:
    """GB/s each way from and to page-locked memory, one at a time and both at once."""
    device, size = device_of(bench), bench.pick(GIB, 1 << 24)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    up, down = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    found: dict[str, Any] = {}
    for name, into, out in (("host_to_device", target, up), ("device_to_host", down, source)):
        spent = timed(partial(into.copy_, out, non_blocking=True), device, warm=1, count=5).device_ms
        found[f"{name}_gb_per_s"] = round(size / spent / 1e6, 1)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    synchronize(device)
    began = time.perf_counter()
    for _ in range(5):
        with torch.cuda.stream(streams[0]):
            target.copy_(up, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            down.copy_(source, non_blocking=True)
    synchronize(device)
    found["both_ways_gb_per_s_each"] = round(5 * size / (time.perf_counter() - began) / 1e9, 1)
    bench.report(**found)


CHECKS = (
    Check("P0", "versions", 15, versions),
    Check("P0", "throughput", 15, throughput),
    Check("P0", "host_copies", 15, host_copies, "copies between host and device"),
)
