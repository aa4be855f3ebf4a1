"""Post-hoc EMA of any length, chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3.2).

While a run trains, its power-function EMAs are saved every `train.power_ema_every_steps` steps:

    <run>/ema/step-00012000/power-0.05.safetensors      unsharded tensors, in float16 as in EDM2

Each is the average of the weights over a profile p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T]. A new profile
is approximated by the weighted sum of stored profiles that is nearest in the least squares over t, and its EMA by the
same sum of the stored EMAs. A file exists completely or not at all, and contains its own checksum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from udddm.backends.engines.base import Engine
from udddm.ema import PowerEMA, exponent
from udddm.errors import CheckpointError, ConfigError
from udddm.files import atomic_save, make_directory
from udddm.runs.checkpoint import NAME, step_of
from udddm.runs.run import AVERAGES, Run

Floats = npt.NDArray[np.float64]
LARGEST_ERROR = 0.03
"""Largest distance of a sum of stored profiles from the requested one, relative to the latter's norm. With sixteen
snapshots of lengths 0.05 and 0.1 the distance is 0.004 for 0.07, and below this limit for 0.04 to 0.2."""
_FILE = re.compile(r"power-([0-9.e-]+)\.safetensors")


@dataclass(frozen=True)
class Stored:
    """A power-function EMA as it was after `step`."""

    path: Path
    step: int
    length: float


def write(run_dir: Path, step: int, averages: Sequence[PowerEMA], engine: Engine) -> None:
    """Save the EMAs after `step`, replacing existing ones. Every rank must call it; the first rank holds one EMA at a
    time in memory. Raises CheckpointError on a full or read-only disk."""
    for average in averages:
        tensors = {}
        for name in engine.shapes:
            whole = engine.whole(average.weights, name, 0)
            if whole is not None:
                tensors[name] = whole.half()
        path = run_dir / AVERAGES / f"step-{step:08d}" / f"{average.name}.safetensors"
        engine.ranks.run_on_rank_zero(partial(_put, path, tensors), (CheckpointError,))


def _put(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    metadata = {"crc32c": _checksum(tensors)}
    try:
        make_directory(path.parent)
        atomic_save(path, lambda temporary: save_file(dict(tensors), temporary, metadata))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the EMA {path}: {error}. Checkpoints are intact; make room or restore access, then run "
            "the same command again to resume"
        ) from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC32C of the tensors' names and bytes."""
    found = 0
    for name in sorted(tensors):
        found = google_crc32c.extend(found, name.encode())
        found = google_crc32c.extend(found, tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"{found:08x}"


def stored(directory: Path) -> list[Stored]:
    """The EMAs saved in `<run>/ema`, oldest first, without incomplete ones."""
    found = []
    for path in directory.glob("step-*/power-*.safetensors"):
        match = _FILE.fullmatch(path.name)
        if match and NAME.fullmatch(path.parent.name):
            found.append(Stored(path, step_of(path.parent), float(match[1])))
    return sorted(found, key=lambda one: (one.step, one.length))


def overlap(step: Floats, gamma: Floats, other_step: Floats, other_gamma: Floats) -> Floats:
    """The integral of the product of two profiles, of any shapes that broadcast.

    (gamma + 1) (gamma' + 1) / (T^(gamma + 1) T'^(gamma' + 1)) times the integral of t^(gamma + gamma') up to the lesser
    of T and T', written with ratios below 1, because T^gamma would overflow.
    """
    least = np.minimum(step, other_step)
    found: Floats = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) / np.maximum(step, other_step)
    return found * (least / step) ** gamma * (least / other_step) ** other_gamma


def coefficients(steps: Floats, gammas: Floats, step: float, gamma: float) -> tuple[Floats, float]:
    """The coefficients [N] of the stored EMAs for the EMA of `gamma` at `step`, and the distance of the two profiles.

    The coefficients are scaled to a sum of 1, so that network weights that never changed are reproduced exactly. The
    distance is relative to the norm of the requested profile.
    """
    wanted_step, wanted = np.array(step, np.float64), np.array(gamma, np.float64)
    pairs = overlap(steps[:, None], gammas[:, None], steps, gammas)
    aims = overlap(steps, gammas, wanted_step, wanted)
    norm = np.diagonal(pairs) ** -0.5  # normalize the profiles, so that longer ones are not numerically lost
    solved = np.linalg.lstsq(pairs * norm[:, None] * norm, aims * norm, rcond=1e-13)[0] * norm
    solved /= solved.sum()
    whole = float(overlap(wanted_step, wanted, wanted_step, wanted))
    square = (whole - 2 * solved @ aims + solved @ pairs @ solved) / whole
    return solved, math.sqrt(max(float(square), 0.0))


def average(run: Run, length: float, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The EMA of relative `length` at the newest step that `run` saved, in float32, for a network of `shapes`.

    Raises ConfigError if no power function has this length; CheckpointError if the stored EMAs cannot approximate it,
    are damaged, or belong to a different network; StoreError.
    """
    try:
        gamma = exponent(length)
    except ValueError as error:
        raise ConfigError(f"the EMA length: {error}") from None
    found = stored(run.averages())
    if not found:
        raise CheckpointError(f"{run} holds no EMAs to choose a length from: train with train.power_ema=[0.05, 0.1]")
    steps = np.array([one.step for one in found], np.float64)
    gammas = np.array([exponent(one.length) for one in found])
    weights, off = coefficients(steps, gammas, steps.max(), gamma)
    if off > LARGEST_ERROR:
        raise CheckpointError(
            f"the {len(found)} EMAs in {run} cannot approximate one of length {length:g}: the nearest is off by "
            f"{off:.0%}. Choose a length closer to theirs ({_lengths(found)}), or train with more lengths or more "
            "snapshots (train.power_ema, train.power_ema_every_steps)"
        )
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for one, weight in zip(found, weights.tolist(), strict=True):
        for name, tensor in _read(one.path, f"{run}/{one.path.relative_to(run.path)}", shapes).items():
            total[name].add_(tensor.double(), alpha=weight)
    return {name: tensor.float() for name, tensor in total.items()}


def _lengths(found: Sequence[Stored]) -> str:
    return ", ".join(f"{length:g}" for length in sorted({one.length for one in found}))


def _read(path: Path, named: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Read and verify one snapshot, which messages call `named`. Raises CheckpointError."""
    without = "delete it to continue without it"
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("crc32c")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {named}: {error}; {without}") from error
    if stated != _checksum(tensors):
        raise CheckpointError(f"{named} does not match its checksum; {without}")
    if {name: tensor.shape for name, tensor in tensors.items()} != dict(shapes):
        raise CheckpointError(f"{named} belongs to a different network")
    return tensors
