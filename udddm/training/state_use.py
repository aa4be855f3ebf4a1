"""Metrics of how a run uses its x0-state: the share of refined visits, and the age of stored targets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig
from udddm.log import log
from udddm.objectives import Objective, Visits, age
from udddm.training.inputs import StepInput


class StateUse:
    """Accumulates the metrics between two reports. Every rank has one."""

    def __init__(self, config: RunConfig, objective: Objective, ranks: Ranks):
        self._refines = objective.refines and config.objective.refined.share > 0
        self._every, self._ranks = config.log_every_steps, ranks
        self._refined = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._ages = torch.zeros(2, device=ranks.device)
        self._warned = False

    def decided(self, part: StepInput, state: torch.Tensor) -> Visits:
        """The plan of a micro-batch, after it is decided which of its visits are refined, which are counted.

        `state` [b, C, H, W] is the x0-state that the micro-batch reads.
        """
        refined = part.visits.refined
        if refined is None or not refined.some:
            return part.visits
        refined = refined.decided(part.images, state)
        self._refined += refined.rows.sum()
        return replace(part.visits, refined=refined)

    def wants_age(self, part: StepInput, step: int) -> bool:
        """Whether to call `measure_age` in step `step`: once per report, if targets are stored."""
        return part.visits.stored_rows is not None and (step + 1) % self._every == 0

    def measure_age(self, network: nn.Module, part: StepInput, state: torch.Tensor, output: torch.Tensor) -> None:
        """Evaluate the network at the levels where the targets of a micro-batch were stored (`age.age_norms`)."""
        self._ages += age.age_norms(network, part.images, state, output, part.visits, part.labels)

    def report(self, step: int, visits: float) -> dict[str, float]:
        """The metrics since the last report, in which all ranks made `visits` visits. Every rank must call this."""
        found = {}
        if self._refines:
            found["refined_fraction"] = self._ranks.sum(self._refined) / visits
            self._refined.zero_()
        aged, taught = (self._ranks.sum(each) for each in self._ages)
        self._ages.zero_()
        if taught > 0:
            ratio = found["store_age_ratio"] = aged / taught
            if ratio > age.LIMIT and not self._warned and self._ranks.is_rank_zero:
                self._warned = True
                log.warning(
                    f"step {step}: stored targets have changed by {ratio:.0%} of what they teach since they were "
                    f"stored (store_age_ratio). Above {age.LIMIT:.0%} they mostly teach their age: use ict or ect, "
                    "with refined pairs for the state (docs/method.md)"
                )
        return found
