"""What a rank accumulates between two reports of its progress, and the metrics that a report makes of it."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines import Engine
from udddm.order import Order
from udddm.store import X0Store
from udddm.training.inputs import StepInput
from udddm.training.state_use import StateUse

SIGMA_EDGES = (0.2, 1.0, 5.0)
"""The noise-to-signal ratios that separate the bands of `LossBySigma`."""


class LossBySigma:
    """The mean loss of visits in bands of their noise level, of which the mean over all levels hides much."""

    def __init__(self, device: torch.device):
        self._edges = torch.tensor(SIGMA_EDGES, device=device)
        self._bands = torch.arange(len(SIGMA_EDGES) + 1, device=device)[:, None]
        self._sums = torch.zeros(2, len(self._bands), device=device)

    def add(self, part: StepInput, losses: torch.Tensor) -> None:
        """Add the losses [b] of a micro-batch. Does not wait for the device."""
        alpha, sigma = part.visits.coefficients[:2]
        weights = (torch.bucketize(sigma / alpha, self._edges)[None] == self._bands) * part.weights
        self._sums += torch.stack([(weights * losses.detach()).sum(1), weights.sum(1)])

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The mean loss of each band with a visit since the last call. Every rank must call this."""
        total = torch.stack([torch.tensor(each) for each in ranks.gather(self._sums.tolist())]).sum(0)
        self._sums.zero_()
        names = [f"loss_sigma_below_{SIGMA_EDGES[0]:g}"]
        names += [f"loss_sigma_{low:g}_to_{high:g}" for low, high in itertools.pairwise(SIGMA_EDGES)]
        names += [f"loss_sigma_above_{SIGMA_EDGES[-1]:g}"]
        return {name: loss / n for name, loss, n in zip(names, *total.tolist(), strict=True) if n > 0}


@dataclass
class Sources:
    """What a report reads."""

    ranks: Ranks
    engine: Engine
    store: X0Store
    order: Order
    state_use: StateUse
    data_wait: Callable[[float], float]
    """Maps seconds to the fraction of them for which steps waited for images since the last call."""


class Reports:
    """The metrics of a run from step `first` to `total`. Every rank has one, and must call every method."""

    def __init__(self, sources: Sources, first: int, total: int):
        self._from, self._total = sources, total
        self.started = self._since = time.perf_counter()
        self.first = self._step = first
        self._counters = replace(sources.store.counters)
        self.loss = torch.zeros((), device=sources.ranks.device)
        """This rank's part of the sum of the losses since the last report."""

    def mean_loss(self, step: int) -> float:
        """The mean loss since the last report, over all ranks; waits for the device."""
        return self._from.ranks.sum(self.loss) / (step - self._step)

    def write(self, step: int, loss: float, by_sigma: LossBySigma, learning_rate: float) -> dict[str, float]:
        """The metrics since the last report; starts the next one."""
        source = self._from
        now = time.perf_counter()
        seconds, steps = now - self._since, step - self._step
        images_per_step = source.order.samples / source.order.steps_per_epoch
        counters, norm = replace(source.store.counters), source.engine.gradient_norm()
        rate = steps / seconds
        found = {
            "epoch": step / source.order.steps_per_epoch,
            "images": round(step * images_per_step),
            "loss": loss,
            **by_sigma.take(source.ranks),
            "learning_rate": learning_rate,
            **({} if norm is None else {"gradient_norm": norm}),
            "images_per_second": rate * images_per_step,
            **source.state_use.report(step, steps * images_per_step),
            "data_wait_fraction": source.data_wait(seconds),
            **counters.metrics(self._counters, seconds),
            **{f"store_{name}": value for name, value in source.store.gauges().items()},
            **gpu_memory(source.ranks.device),
            "elapsed_seconds": now - self.started,
            "eta_seconds": (self._total - step) / rate,
            "time": time.time(),
        }
        self._since, self._step, self._counters = now, step, counters
        self.loss.zero_()
        return found

    def result(self, step: int) -> dict[str, float]:
        """The figures of `result.json` about this process's part of the run."""
        order, counters = self._from.order, self._from.store.counters
        elapsed = time.perf_counter() - self.started
        return {
            "steps": step,
            "epochs": step / order.steps_per_epoch,
            "images_per_second": (step - self.first) / order.steps_per_epoch * order.samples / elapsed,
            "store_wait_fraction": counters.waited / elapsed,
            "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The peak GPU memory of this rank's tensors since its start, in bytes; {} on a CPU."""
    if device.type != "cuda":
        return {}
    return {"gpu_memory_bytes": float(torch.cuda.max_memory_allocated(device))}


def diverged(what: str, step: int, newest: tuple[str, int] | None) -> str:
    """The message of a run that diverged: `what` is not finite. `newest` is its newest checkpoint, and its step."""
    advice = "to lower train.learning_rate, set train.grad_clip or change train.precision, start a new run (--run-dir)"
    if newest is None:
        return f"{what} is not finite after step {step}, and there is no checkpoint yet; {advice}"
    return (
        f"{what} is not finite after step {step}. The newest checkpoint, from step {newest[1]}, is intact; the same "
        f"command resumes from it, which helps if the hardware was at fault. Otherwise, {advice}, with "
        f"train.init_from={newest[0]} to start from the weights of that checkpoint"
    )
