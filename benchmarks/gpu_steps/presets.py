"""P11: the small presets, whose steps are bound by the start of kernels: eager, and with CUDA graphs."""

from __future__ import annotations

import time

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import Passes, Shape, preset, synchronize, timed

PRESETS: dict[str, Shape] = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28)}


def eager(bench: Bench) -> None:
    for name, shape in PRESETS.items():
        config = preset(name, "train.cuda_graphs=false")
        made = Passes(config, shape, bench, batch=config.train.batch_size, teacher="none")
        timing = timed(made.step, made.device, warm=3, count=bench.pick(50, 3))
        bench.report(**{name: {"images_per_s": timing.rate(made.batch), **timing.figures()}})


def graphs(bench: Bench) -> None:
    """`train.cuda_graphs`."""
    for name, shape in PRESETS.items():
        config = preset(name, "train.cuda_graphs=true")
        made = Passes(config, shape, bench, batch=config.train.batch_size, teacher="none")
        began = time.perf_counter()
        made.step()
        synchronize(made.device)
        bench.report(**{f"{name}_capture_s": round(time.perf_counter() - began, 1)})
        timing = timed(made.step, made.device, warm=5, count=bench.pick(50, 3))
        bench.report(**{name: {"images_per_s": timing.rate(made.batch), **timing.figures()}})


CHECKS = (Check("P11", "eager", 20, eager), Check("P11", "graphs", 25, graphs, "CUDA graphs"))
