"""The contract of a launcher: it starts the processes of a run and watches them.

A launcher runs one *attempt* at a job with a given number of workers, to its end; `supervise` decides what follows a
failed attempt. Errors that another attempt would only repeat (a configuration, the data, a diverged loss) are raised at
once. A worker that was killed, a node that is gone or a collective that hung costs one of `max_failures`, and the next
attempt resumes from the newest valid checkpoint, with as many workers as are available then.
"""

from __future__ import annotations

import pickle
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from udddm.backends import engines
from udddm.backends.distributed.listener import Listener
from udddm.backends.distributed.ranks import TIMEOUT, join
from udddm.config import RunConfig
from udddm.data import MapDataset
from udddm.errors import ConfigError, DataError, Diverged, Interrupted, RankError, UdddmError, WorkerLost
from udddm.log import install, log
from udddm.order import check_world
from udddm.training.rank import train_rank

NON_RETRYABLE = (ConfigError, DataError, Diverged, Interrupted)
"""Errors that another attempt would only repeat, or that must not be repeated."""


@dataclass(frozen=True)
class Job:
    """What a launcher runs: a run, and how many workers it may have."""

    config: RunConfig
    run_dir: str | Path
    dataset: MapDataset | Callable[[], MapDataset] | None = None
    device: str = "auto"
    workers: tuple[int, int] = (1, 1)
    max_failures: int = 0
    timeout: float = TIMEOUT
    versions: dict[str, str] = field(default_factory=lambda: versions())
    log_level: int = field(default_factory=log.getEffectiveLevel)
    """The driver's level of the logger `udddm`, which new worker processes take over."""

    def resolve_num_workers(self, available: int) -> int:
        """The largest requested number of workers that divides the lanes and is available. Raises ConfigError."""
        low, high = self.workers
        lanes = self.config.order.lanes
        for workers in range(min(high, available), low - 1, -1):
            if lanes % workers == 0:
                return workers
        if not any(lanes % workers == 0 for workers in range(low, high + 1)):
            check_world(lanes, high)
        raise ConfigError(
            f"--workers {low if low == high else f'{low}:{high}'}: there is room for {available} "
            f"worker{'' if available == 1 else 's'} here; ask for fewer, or add machines"
        )


def versions() -> dict[str, str]:
    """What must be the same on a driver and its workers."""
    import torch

    import udddm

    return {"udddm": udddm.__version__, "torch": torch.__version__, "Python": platform.python_version()}


def check_versions(expected: dict[str, str]) -> None:
    """Raises ConfigError naming what differs from the driver's versions."""
    differing = [f"{name} {versions()[name]} (driver: {v})" for name, v in expected.items() if versions()[name] != v]
    if differing:
        raise ConfigError(
            f"this worker ({platform.node()}) has other versions than the driver: {', '.join(differing)}; "
            "install the same environment everywhere"
        )


class Launcher(ABC):
    """`--backend` names a class or function that returns one when called without arguments."""

    @abstractmethod
    def available_workers(self, job: Job) -> int:
        """The number of workers that could start now. May wait for machines. Raises ConfigError."""

    @abstractmethod
    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        """Run the job to its end with this number of workers, and return rank zero's result.

        Every worker sets the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, and MASTER_ADDR and
        MASTER_PORT, or `UDDDM_RENDEZVOUS` on one machine) and calls `run_rank`; one in a new process first calls
        `start_logging`. Raises what a rank raised, or WorkerLost.
        """


def start_logging(job: Job) -> None:
    """Print this worker process's messages as the driver's are printed."""
    install(force=True, level=job.log_level)


def run_rank(job: Job, listener: Listener | None) -> dict[str, Any]:
    """Join the ranks that the environment describes, do this rank's part, and return its result."""
    check_versions(job.versions)
    needs_group = engines.find(job.config).needs_process_group
    ranks = join(job.device, job.config.order.lanes, group=needs_group, timeout=job.timeout)
    try:
        dataset = job.dataset
        factory = isinstance(dataset, type) or (callable(dataset) and not hasattr(dataset, "__getitem__"))
        made = dataset() if factory else dataset  # type: ignore[operator,misc]
        return train_rank(job.config, made, job.run_dir, ranks, listener)  # type: ignore[arg-type]
    except RuntimeError as error:
        if ranks.world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RankError(f"another rank is gone or did not answer in {job.timeout:.0f} s: {error}") from error
        raise
    finally:
        ranks.close()


def picklable(error: BaseException) -> BaseException:
    """The error, or a RankError with its message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"{type(error).__name__}: {error}")
    return error


def root_cause(errors: list[BaseException]) -> BaseException:
    """The one of the ranks' errors that caused the others."""

    def order(error: BaseException) -> int:
        if isinstance(error, RankError):
            return 3
        if isinstance(error, WorkerLost):
            return 1
        return 0 if isinstance(error, UdddmError) else 2

    return min(errors, key=order)


def supervise(launcher: Launcher, job: Job) -> dict[str, Any]:
    """Run attempts until the job is done or has failed more than `max_failures` times. Raises the last error."""
    failures = 0
    while True:
        workers = job.resolve_num_workers(launcher.available_workers(job))
        try:
            return launcher.run_attempt(job, workers)
        except NON_RETRYABLE:
            raise
        except Exception as error:
            failures += 1
            if failures > job.max_failures:
                if job.max_failures:
                    error.add_note(f"that was failure {failures}; --max-failures is {job.max_failures}")
                raise
            log.warning("failure %d of %d that are allowed: %s", failures, job.max_failures, error)
            log.info("restarting from the newest valid checkpoint")
