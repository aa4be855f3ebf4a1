"""Progress reports of a run: a progress bar or plain lines, and metrics.jsonl."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from udddm.files import write_text
from udddm.log import Dispensable, log, tqdm


class Line:
    """Progress on stderr: a bar on a terminal, otherwise a plain line every `PLAIN_EVERY` seconds."""

    PLAIN_EVERY = 10.0  # seconds between plain lines

    def __init__(self) -> None:
        self._bar: Any = None
        self._last_line = time.monotonic()
        self._shown = -1

    def advance(self, step: int, total: int) -> None:
        with suppress(OSError, ValueError):
            if sys.stderr is None or not sys.stderr.isatty():
                return
            if self._bar is None:
                self._bar = tqdm()(total=total, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)
            self._bar.update(step - self._bar.n)

    def show(self, step: int, total: int, values: dict[str, float]) -> None:
        """Show the images seen, the loss, the rates, the store's counters if it transfers anything, and the ETA."""
        if step == self._shown:
            return
        self._shown = step
        shown = {"kimg": f"{values['images'] / 1000:.4g}"} if "images" in values else {}
        shown["loss"] = f"{values['loss']:.4g}"
        for key, name in (("learning_rate", "lr"), ("gradient_norm", "grad")):
            if key in values:
                shown[name] = f"{values[key]:.3g}"
        shown["images/s"] = f"{values['images_per_second']:.0f}"
        if values["store_megabytes_per_second"]:  # a store that transfers nothing has no queue and no wait
            shown["store wait"] = f"{values['store_wait_fraction']:.1%}"
            shown["queue"] = f"{values['store_queue_depth']:.1f}"
            shown["MB/s"] = f"{values['store_megabytes_per_second']:.0f}"
            shown["retries"] = f"{values['store_retries']:.0f}"
        self.advance(step, total)
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.set_postfix(shown)
        elif time.monotonic() - self._last_line >= self.PLAIN_EVERY or step == total:
            self._last_line = time.monotonic()
            minutes, seconds = divmod(round(values["eta_seconds"]), 60)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            log.info(f"{time.strftime('%H:%M:%S')}  step {step}/{total}  {text}  ETA {minutes}:{seconds:02d}")

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()


class Progress:
    """Reports training progress from step `start` to `total`. `write` records metrics; `close` finishes the bar.

    If `on_metrics` is given, it receives the step, the total and the metrics, and nothing is shown here.
    """

    def __init__(
        self, run: Path, start: int, total: int, on_metrics: Callable[[int, int, dict[str, float]], None] | None = None
    ):
        self._path, self._output = run / "metrics.jsonl", Dispensable("metrics.jsonl")
        with self._output.attempt():
            self._keep_until(start)
        self._step, self._total, self._on_metrics = start, total, on_metrics
        self._line = Line()

    def _keep_until(self, step: int) -> None:
        """Drop the lines of steps after the checkpoint, which a killed run took and which are now repeated."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self._path, "".join(kept))

    def advance(self) -> None:
        self._step += 1
        if self._on_metrics is None:
            self._line.advance(self._step, self._total)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of a step, and show the rates, the store's counters and the ETA."""
        with self._output.attempt():
            self._append(json.dumps({"step": step, **values}) + "\n")
        if self._on_metrics is None:
            self._line.show(step, self._total, values)
        else:
            self._on_metrics(step, self._total, values)

    def _append(self, line: str) -> None:
        """Append a line completely or not at all."""
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, size)
            raise

    def close(self) -> None:
        self._line.close()
