"""Stepping back from a spike of the loss (`train.spike_factor`).

The order of samples, their noise and their levels are functions of the position, so that a run that only resumed would
meet the same spike. It therefore goes on from its newest checkpoint with half the learning rate, until as many steps
after the spike as it stepped back, in the way in which runs of large language models restart from a checkpoint and skip
batches (Chowdhery et al. 2022, section 5.1); here no sample may be skipped, because each has its x0-state.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from udddm.files import write_json

FILE = "spikes.json"
USUAL = 8
"""Reports whose median is the usual loss."""
FEWEST = 3
"""Reports in a phase before a loss counts as a spike."""
MOST = 6
"""Times that a run steps back. Then it goes on, or ends if the loss is not finite."""
FACTOR = 0.5


@dataclass(frozen=True)
class SteppedBack:
    """One step back, as in `<run>/spikes.json`."""

    spike: int
    """The step after which the spike was seen."""
    back_to: int
    """The step of the checkpoint from which the run went on."""
    loss: float | None
    """None if it was not finite."""
    usual: float | None

    def factor(self, step: int) -> float:
        """The factor of the learning rate of step number `step`, counted from 0."""
        return FACTOR if self.back_to <= step < 2 * self.spike - self.back_to else 1.0


class LossSpike(Exception):
    """Raised on every rank to end an attempt, after which training restarts from the newest checkpoint."""

    def __init__(self, event: SteppedBack):
        super().__init__(event)
        self.event = event


class Watch:
    """Compares each loss with the usual one in its phase. With a factor of None, nothing is a spike."""

    def __init__(self, factor: float | None):
        self._factor, self._phase = factor, ""
        self._losses: deque[float] = deque(maxlen=USUAL)

    @property
    def active(self) -> bool:
        return self._factor is not None

    def see(self, loss: float, phase: str) -> float | None:
        """The usual loss, if `loss` is a spike (NaN if it is not known); None if it is not one."""
        if phase != self._phase:
            self._phase = phase
            self._losses.clear()
        known = len(self._losses) >= FEWEST
        usual = statistics.median(self._losses) if known else math.nan
        if self._factor is not None and (not math.isfinite(loss) or loss > self._factor * usual):
            return usual
        self._losses.append(loss)
        return None


def read(run: Path) -> list[SteppedBack]:
    """The times that a run stepped back."""
    with suppress(OSError, ValueError, TypeError):
        return [SteppedBack(**each) for each in json.loads((run / FILE).read_text())]
    return []


def add(run: Path, event: SteppedBack) -> list[SteppedBack]:
    """Record that a run steps back. Returns all times. Raises OSError."""
    events = [*read(run), event]
    write_json(run / FILE, [asdict(each) for each in events])
    return events


def event(spike: int, back_to: int, loss: float, usual: float) -> SteppedBack:
    """`SteppedBack` of numbers that may not be finite."""
    finite = [value if math.isfinite(value) else None for value in (loss, usual)]
    return SteppedBack(spike, back_to, *finite)


def message(event: SteppedBack) -> str:
    """What a run says when it steps back."""
    seen = "not finite" if event.loss is None else f"{event.loss:.4g}"
    usual = "" if event.usual is None else f", where {event.usual:.4g} is usual"
    until = 2 * event.spike - event.back_to
    return (
        f"step {event.spike}: the loss is {seen}{usual}: going on from the checkpoint of step {event.back_to}, with "
        f"half the learning rate until step {until} (train.spike_factor)"
    )
