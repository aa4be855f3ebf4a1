"""GPUs by name: their memory and peak speed, for the estimates of a dry run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from udddm.errors import ConfigError
from udddm.tools.throughput import SHORTEST, UTILISATION


@dataclass(frozen=True)
class GPU:
    """A kind of GPU (NVIDIA data sheets, dense operations, without sparsity)."""

    name: str
    memory: float
    """Bytes."""
    half: float
    """FLOP/s in bf16, or in fp16 where there is no bf16."""
    single: float
    """FLOP/s in float32: of TF32, where there is TF32, which `train.tf32` allows."""

    def peak(self, precision: str) -> float:
        return self.single if precision == "fp32" else self.half


def _gpu(name: str, gigabytes: float, half: float, single: float) -> GPU:
    return GPU(name, gigabytes * 1e9, half * 1e12, single * 1e12)


KINDS = (
    _gpu("B200", 180, 2250, 1125),
    _gpu("H200", 141, 989, 494),
    _gpu("H100", 80, 989, 494),
    _gpu("A100", 80, 312, 156),
    _gpu("L40S", 48, 362, 183),
    _gpu("A6000", 48, 155, 77),
    _gpu("A10", 24, 125, 62),
    _gpu("L4", 24, 121, 60),
    _gpu("RTX4090", 24, 165, 83),
    _gpu("RTX3090", 24, 71, 36),
    _gpu("V100", 32, 125, 16),
    _gpu("T4", 16, 65, 8),
)


@dataclass(frozen=True)
class GPUs:
    """Several GPUs of one kind."""

    count: int
    kind: GPU

    def __str__(self) -> str:
        return f"{self.count}x{self.kind.name}"

    def step(self, operations: float, precision: str) -> float | None:
        """Seconds of a step of `operations` FLOP at the assumed utilization, without communication. None for a step so
        short that launching its kernels takes longer."""
        seconds = operations / (self.count * self.kind.peak(precision) * UTILISATION)
        return seconds if seconds >= SHORTEST else None


def parse(text: str) -> GPUs:
    """Parse `8xH100`, or `H100` for one. Raises ConfigError."""
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([A-Za-z][\w -]*)", text.strip())
    name = re.sub(r"[\s_-]", "", found[2]).upper() if found else ""
    kind = next((kind for kind in KINDS if name == kind.name or name.removeprefix("NVIDIA") == kind.name), None)
    if found is None or kind is None or found[1] == "0":
        known = ", ".join(kind.name for kind in KINDS)
        raise ConfigError(f"--gpus {text}: give a number and a kind, such as 8xH100. Known kinds: {known}")
    return GPUs(int(found[1] or 1), kind)


def named(device_name: str) -> GPU | None:
    """The kind of the device that CUDA calls `device_name`, such as "NVIDIA H200". None if it is not known."""
    words = re.split(r"[^A-Za-z0-9]+", device_name.upper().replace("RTX ", "RTX"))
    return next((kind for kind in KINDS if kind.name in words), None)
