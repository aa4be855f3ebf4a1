"""The steps of benchmarks/gpu.py."""

from __future__ import annotations

from gpu_steps import (
    beside,
    bits,
    commands,
    facts,
    memory,
    one_step,
    presets,
    speed,
    stores,
    trainer,
    two_ranks,
    waits,
    zero,
)
from gpu_steps.harness import Check

MODULES = (facts, stores, one_step, waits, bits, speed, two_ranks, zero, trainer, beside, memory, presets, commands)
"""P0 to P12."""
CHECKS: tuple[Check, ...] = (*(check for module in MODULES for check in module.CHECKS), *speed.LAST)
TITLES = {module.CHECKS[0].step: (module.__doc__ or "").splitlines()[0] for module in MODULES}
DECISIVE = ("P1", "P2", "P3", "P4", "P5", "P6")
"""A failed check of these steps makes the exit code 1."""
