"""Where the time of a step goes: a trace of some steps by torch.profiler, and a table of the parts of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.files import make_directory, write_text
from udddm.log import Dispensable, log

SKIPPED = 10
"""Steps before the first one that is traced: they compile, capture graphs and fill queues."""
PREFIX = "udddm: "
OPERATIONS = 25
"""Operations in the table."""


@contextlib.contextmanager
def region(name: str) -> Iterator[None]:
    """A part of a step, which traces and the table show as `name`. Regions are not nested."""
    with torch.profiler.record_function(PREFIX + name):
        yield


class Profile:
    """Traces `steps` steps of a rank. Files: `<run>/profile/rank<r>.trace.json`, for chrome://tracing or
    https://ui.perfetto.dev, and `rank<r>.txt`, the tables."""

    def __init__(self, run: Path, steps: int, ranks: Ranks):
        self._directory, self._steps, self._device, self._rank = run / "profile", steps, ranks.device, ranks.rank
        self._output = Dispensable("the profile")
        self._seen = 0
        self._profiler: Any = None
        self._began = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def after_step(self) -> None:
        """Begin or end the trace, if it is time."""
        self._seen += 1
        if self._steps and self._seen == SKIPPED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize(self._device)
            self._profiler = torch.profiler.profile(activities=activities, acc_events=True)  # no schedule
            self._profiler.__enter__()
            self._began = time.perf_counter()
        elif self._profiler is not None and self._seen == SKIPPED + self._steps:
            self.close()

    def close(self) -> None:
        """End the trace, if there is one, and write its files."""
        if self._profiler is None:
            if self._steps and self._seen < SKIPPED:
                log.warning(
                    f"no profile was written: the run had {self._seen} steps, and the first {SKIPPED} are not traced"
                )
                self._steps = 0
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profiler, seconds = self._profiler, time.perf_counter() - self._began
        self._profiler, steps = None, self._seen - SKIPPED
        self._steps = 0
        profiler.__exit__(None, None, None)
        if not steps:
            return
        with self._output.attempt():
            make_directory(self._directory)
            path = self._directory / f"rank{self._rank}.trace.json"
            profiler.export_chrome_trace(str(path))
            text = table(profiler, steps, seconds)
            write_text(path.with_name(f"rank{self._rank}.txt"), text)
            if self._rank == 0:
                log.info(f"profile of {steps} steps in {self._directory}:\n{text.partition(chr(10) * 2)[0]}")


def table(profiler: Any, steps: int, seconds: float) -> str:
    """The parts of a step with their share of the time, and the operations that take the most of it."""
    averages = profiler.key_averages()
    parts = [each for each in averages if each.key.startswith(PREFIX) and str(each.device_type).endswith("CPU")]
    lines = [f"{'part of a step':<28}{'ms':>10}{'share':>9}"]
    for each in sorted(parts, key=lambda e: -e.cpu_time_total):
        spent = each.cpu_time_total / 1e6
        lines.append(f"{each.key.removeprefix(PREFIX):<28}{1e3 * spent / steps:>10.2f}{spent / seconds:>9.1%}")
    rest = max(0.0, seconds - sum(each.cpu_time_total for each in parts) / 1e6)
    lines.append(f"{'(the rest)':<28}{1e3 * rest / steps:>10.2f}{rest / seconds:>9.1%}")
    lines.append(f"{'step':<28}{1e3 * seconds / steps:>10.2f}{1:>9.1%}")
    by = "self_device_time_total" if any(e.self_device_time_total for e in averages) else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + str(averages.table(sort_by=by, row_limit=OPERATIONS)) + "\n"
