"""The line at the end of `udddm train`: what was trained, where the pictures are, and what to type next."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from udddm.config import RunConfig
from udddm.runs.result import TrainResult
from udddm.storage import local_path

SCORES = ("fid", "fd", "kid")
"""The scores of an evaluation, of which the first that it has is shown."""


def last_line(
    config: RunConfig, run_dir: str | Path, result: TrainResult, seconds: float, command: str = "udddm"
) -> str:
    """One line about a finished run. `seconds` is the time since this process started it, `command` how it is typed."""
    run = local_path(run_dir)
    metrics = _last(run / "metrics.jsonl") if run is not None else {}
    parts = [f"done in {_duration(seconds)}: {result.steps:,} steps"]
    if "images" in metrics:
        parts.append(f"{metrics['images'] / 1000:.4g} kimg")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4g}")
    scores = _last(run / "evaluation.jsonl") if run is not None else {}
    parts += [f"{name} {scores[name]:.4g}" for name in SCORES if scores.get(name) is not None][:1]
    if config.sample.final:
        parts.append(f"{config.sample.final:,} samples in {str(run_dir).rstrip('/')}/samples.png")
    return f"{', '.join(parts)}. Next: {command} sample {shlex.quote(str(run_dir))} --count 100 --nfe 4"


def _last(path: Path) -> dict[str, Any]:
    """The last complete line of a file of JSON lines; {} without one."""
    with suppress(OSError):
        for line in reversed(path.read_text().splitlines()):
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return found
    return {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
