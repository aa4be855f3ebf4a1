"""Averages of any length, chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3.2).

While a run trains, its power-function averages are put down every `train.power_ema_every_steps` steps:

    <run>/ema/step-00012000/power-0.05.safetensors      whole tensors, in float16 as in EDM2

Each is the average of the weights over a profile p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T]. Another profile
is approximated by the sum of stored ones that is nearest to it in the least squares over t, and the average over it by
the same sum of the stored averages. A file is there complete or not at all, and holds its own checksum.
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
"""How far a sum of stored profiles may be from the wanted one, relative to its norm. With sixteen snapshots of lengths
0.05 and 0.1 it is 0.004 for 0.07, and less than this for 0.04 to 0.2."""
_FILE = re.compile(r"power-([0-9.e-]+)\.safetensors")


@dataclass(frozen=True)
class Stored:
    """One power-function average as it was after `step`."""

    path: Path
    step: int
    length: float


def write(run_dir: Path, step: int, averages: Sequence[PowerEMA], engine: Engine) -> None:
    """Put down the averages after `step`; one that is there already is replaced. Every rank must call it; the first
    holds one average at a time. Raises CheckpointError on a full or read-only disk."""
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
            f"cannot write the average {path}: {error}. Checkpoints are intact; make room or restore access, then run "
            "the same command again to resume"
        ) from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC32C of the names and bytes."""
    found = 0
    for name in sorted(tensors):
        found = google_crc32c.extend(found, name.encode())
        found = google_crc32c.extend(found, tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"{found:08x}"


def stored(directory: Path) -> list[Stored]:
    """What was put down in `<run>/ema`, oldest first; what was cut short on its way there is not in it."""
    found = []
    for path in directory.glob("step-*/power-*.safetensors"):
        match = _FILE.fullmatch(path.name)
        if match and NAME.fullmatch(path.parent.name):
            found.append(Stored(path, step_of(path.parent), float(match[1])))
    return sorted(found, key=lambda one: (one.step, one.length))


def overlap(step: Floats, gamma: Floats, other_step: Floats, other_gamma: Floats) -> Floats:
    """The integral of the product of two profiles, of any shapes that broadcast.

    (gamma + 1) (gamma' + 1) / (T^(gamma + 1) T'^(gamma' + 1)) times the integral of t^(gamma + gamma') up to the lesser
    of T and T', written with ratios below 1, for T^gamma would overflow.
    """
    least = np.minimum(step, other_step)
    found: Floats = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) / np.maximum(step, other_step)
    return found * (least / step) ** gamma * (least / other_step) ** other_gamma


def coefficients(steps: Floats, gammas: Floats, step: float, gamma: float) -> tuple[Floats, float]:
    """The weights [N] of stored averages for the one of `gamma` at `step`, and how far their profile is from its own.

    They are scaled to a sum of 1, so that weights which never changed come out as they are. The distance is relative to
    the norm of the wanted profile.
    """
    wanted_step, wanted = np.array(step, np.float64), np.array(gamma, np.float64)
    pairs = overlap(steps[:, None], gammas[:, None], steps, gammas)
    aims = overlap(steps, gammas, wanted_step, wanted)
    norm = np.diagonal(pairs) ** -0.5  # profiles of one norm: the longer ones are not drowned
    solved = np.linalg.lstsq(pairs * norm[:, None] * norm, aims * norm, rcond=1e-13)[0] * norm
    solved /= solved.sum()
    whole = float(overlap(wanted_step, wanted, wanted_step, wanted))
    square = (whole - 2 * solved @ aims + solved @ pairs @ solved) / whole
    return solved, math.sqrt(max(float(square), 0.0))


def average(run: Run, length: float, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The average of relative `length` at the newest step that `run` put down, in float32, of a network of `shapes`.

    Raises ConfigError for a length that no power function has; CheckpointError when what was stored cannot give it, or
    is damaged or of another network; StoreError.
    """
    try:
        gamma = exponent(length)
    except ValueError as error:
        raise ConfigError(f"the length of the average: {error}") from None
    found = stored(run.averages())
    if not found:
        raise CheckpointError(
            f"{run} holds no averages to choose a length from: train with train.power_ema=[0.05, 0.1]"
        )
    steps = np.array([one.step for one in found], np.float64)
    gammas = np.array([exponent(one.length) for one in found])
    weights, off = coefficients(steps, gammas, steps.max(), gamma)
    if off > LARGEST_ERROR:
        raise CheckpointError(
            f"the {len(found)} averages in {run} cannot give one of length {length:g}: the nearest is off by "
            f"{off:.0%}. Choose a length nearer to theirs ({_lengths(found)}), or train with more lengths or more "
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
    """One snapshot, which messages call `named`."""
    without = "remove it to do without it"
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("crc32c")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {named}: {error}; {without}") from error
    if stated != _checksum(tensors):
        raise CheckpointError(f"{named} does not match its checksum; {without}")
    if {name: tensor.shape for name, tensor in tensors.items()} != dict(shapes):
        raise CheckpointError(f"{named} is of another network")
    return tensors
