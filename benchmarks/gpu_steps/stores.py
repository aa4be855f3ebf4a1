"""P1: the stores that keep the x0-state on the device or beside it, against their conformance suite."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

import torch

from gpu_steps.harness import Bench, Check, Skipped
from gpu_steps.workloads import TINY_SHAPE, alone, pixels, running, synchronize, tiny

CONFORMANCE = "tests/integration/test_conformance.py"


def conformance(bench: Bench) -> None:
    """The suite picks CUDA where there is any. A machine may lack the plug-ins that pyproject.toml configures."""
    for name in ("pytest", "hypothesis"):
        if importlib.util.find_spec(name) is None:
            raise Skipped(f"{name} is not installed")
    settings = bench.scratch / "pytest.ini"
    settings.write_text("[pytest]\nmarkers =\n    slow: minutes long\n")
    chosen = "TestDeviceStore or TestPinnedStore"
    if bench.small:
        chosen = f"({chosen}) and fp16 and not random and not snapshots"
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(bench.root), "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--maxfail=3", "--basetemp", str(bench.scratch / "pytest"), "-k", chosen]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, str(bench.root / CONFORMANCE)],
        cwd=bench.root,
        capture_output=True,
        text=True,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    bench.report(seconds=round(time.perf_counter() - began, 1), summary=lines[-1] if lines else "")
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        bench.report(failed=failed)
        print("\n".join(lines[-40:]))
        raise AssertionError(f"pytest ended with exit code {done.returncode}: {len(failed)} tests failed")


def sanitizer(bench: Bench) -> None:
    """Steps over the pinned store under CUDA's stream sanitizer, which sees the kernels of the main thread and the
    events and streams of all; what the store's threads copy themselves it does not see."""
    from torch.cuda import _sanitizer

    ranks = alone(bench)
    torch.zeros(1, device=ranks.device)
    _sanitizer.enable_cuda_sanitizer()  # type: ignore[no-untyped-call]
    config = tiny("store.kind=pinned")
    with running(config, pixels(128, TINY_SHAPE), bench.scratch / "run", ranks) as (trainer, inputs):
        for _ in range(bench.pick(12, 10)):
            trainer.train_step(inputs)
        synchronize(ranks.device)
        bench.report(steps=trainer.step)


CHECKS = (Check("P1", "conformance", 120, conformance), Check("P1", "sanitizer", 60, sanitizer, "the stream sanitizer"))
