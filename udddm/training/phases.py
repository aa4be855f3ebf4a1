"""The phases of a run, at which its loss changes: a denoiser, then the levels or stages of its objective."""

from __future__ import annotations

from udddm.log import log
from udddm.objectives import Objective


class Phases:
    """Logs the phases of an objective as a run reaches them: the loss changes with them, not the model."""

    def __init__(self, objective: Objective, steps_per_epoch: int):
        self._objective, self._steps_per_epoch = objective, steps_per_epoch
        self._current = ""

    def reach(self, step: int) -> None:
        """Log the phase that starts before step number `step`, counted from 0, if one does."""
        phase = self._objective.phase(step // self._steps_per_epoch)
        if phase == self._current:
            return
        if not self._current:
            log.info(f"step {step}: training {phase}")
        else:
            log.info(f"step {step}: training {phase} from here on, whose loss does not compare with that before")
        self._current = phase
