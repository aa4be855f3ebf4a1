"""`udddm-evaluate --ema-length 0.03:0.20`: the scores of a run's averages over a range of lengths."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_COUNT = 8


def lengths(text: str) -> float | tuple[float, ...]:
    """Argument type: a length such as 0.07, or the lengths of a range FROM:TO or FROM:TO:COUNT, evenly spaced."""
    parts = text.split(":")
    try:
        if len(parts) == 1:
            return float(text)
        low, high = float(parts[0]), float(parts[1])
        count = int(parts[2]) if len(parts) == 3 else DEFAULT_COUNT
    except (ValueError, IndexError):
        count = 0
        low = high = math.nan
    if len(parts) > 3 or count < 2 or not 0 < low < high:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write a length such as 0.07, or a range of two or more such as 0.03:0.20 or 0.03:0.20:8"
        )
    return tuple(round(low + (high - low) * i / (count - 1), 4) for i in range(count))


def run(wanted: tuple[float, ...], score: Callable[[float], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Score the average of each length with `score`, which returns the scores on rank zero and None on other ranks.

    Lengths that the saved averages do not determine are skipped with the reason. Raises CheckpointError if that is
    every length.
    """
    from udddm.errors import CheckpointError
    from udddm.log import log

    rows, skipped = [], []
    for length in wanted:
        try:
            found = score(length)
        except CheckpointError as error:
            skipped.append(error)
            log.warning("length %g is skipped: %s", length, error)
            continue
        if found is not None:
            rows.append({"ema_length": length, **found})
            log.info("length %g: %s %.4g", length, *_main(found))
    if len(skipped) == len(wanted):
        raise skipped[0]
    if not rows:
        return None
    best = min(rows, key=lambda row: _main(row)[1])
    return {"of": rows[0]["of"], "best": best["ema_length"], "rows": rows}


def _main(found: dict[str, Any]) -> tuple[str, float]:
    """The name and the value of the score by which lengths are compared."""
    from udddm.errors import ConfigError

    for name in ("fid", "fd", "kid"):
        if name in found:
            return name, float(found[name])
    raise ConfigError("a range of --ema-length is compared by frechet or kid: add one of them to --metrics")


def table(found: dict[str, Any]) -> list[str]:
    """Lines with the score of each length."""
    name, _ = _main(found["rows"][0])
    keys = [key for key in (name, "precision", "recall") if key in found["rows"][0]]
    lines = ["length  " + "  ".join(f"{key:>9}" for key in keys)]
    for row in found["rows"]:
        mark = "  <- best" if row["ema_length"] == found["best"] else ""
        lines.append(f"{row['ema_length']:6g}  " + "  ".join(f"{row[key]:9.4g}" for key in keys) + mark)
    return lines


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the score over the length as a PNG or SVG file. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        from udddm.errors import ConfigError

        raise ConfigError(f"--plot needs matplotlib ({error}): pip install 'udddm[evaluation]'") from error
    name, _ = _main(found["rows"][0])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.plot([row["ema_length"] for row in found["rows"]], [row[name] for row in found["rows"]], "o-")
    axis.set(xlabel="length of the average, relative to the run", ylabel=f"{name} (lower is better)")
    figure.savefig(path, dpi=100)
