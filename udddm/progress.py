"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Protocol


def say(text: str) -> None:
    """One line to the person who runs this."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class _Writer(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


def _tensorboard(directory: Path, purge_step: int) -> _Writer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own imports
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        writer: _Writer = SummaryWriter(str(directory), purge_step=purge_step)
    return writer


class Progress:
    """Reports on training from step `start` of `total`. `metrics` writes a line; `close` finishes the bar."""

    PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal

    def __init__(self, run: Path, start: int, total: int):
        self._path = run / "metrics.jsonl"
        self._keep_until(start)
        self._tensorboard = _tensorboard(run / "tensorboard", start + 1)
        self._bar: Any = None
        self._spoke = time.monotonic()
        self._total = total
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)

    def _keep_until(self, step: int) -> None:
        """Drop the lines of steps that a killed run took after the checkpoint: they are about to be taken again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        temporary = self._path.with_name(self._path.name + ".partial")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record values at a step: the rates, the store's counters and the ETA are also shown."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        shown = {
            "loss": f"{values['loss']:.4g}",
            "images/s": f"{values['images_per_second']:.0f}",
            "store wait": f"{values['store_wait_fraction']:.1%}",
        }
        if values["store_megabytes_per_second"]:  # a store that moves nothing has no queue
            shown["queue"] = f"{values['store_queue_depth']:.1f}"
            shown["MB/s"] = f"{values['store_megabytes_per_second']:.0f}"
            shown["retries"] = f"{values['store_retries']:.0f}"
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif time.monotonic() - self._spoke >= self.PLAIN_EVERY or step == self._total:
            self._spoke = time.monotonic()
            minutes, seconds = divmod(round(values["eta_seconds"]), 60)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            say(f"step {step}/{self._total}  {text}  ETA {minutes}:{seconds:02d}")

    def close(self) -> None:
        self._tensorboard.close()
        if self._bar is not None:
            self._bar.close()
