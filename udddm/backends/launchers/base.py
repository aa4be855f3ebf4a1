"""The interface of a launcher, which starts the processes of a run and monitors them.

A launcher runs one *attempt* at a job to completion, with a given number of workers. `supervise` decides what follows a
failed attempt. Errors that another attempt would only repeat (in the configuration or the data, or a diverged loss) are
raised immediately. A killed worker, a lost node or a hung collective counts as one of `max_failures`; the next attempt
resumes from the newest valid checkpoint, with as many workers as are available by then.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from udddm.backends import engines
from udddm.backends.distributed.listener import Listener
from udddm.backends.distributed.ranks import TIMEOUT, join
from udddm.backends.distributed.signals import StopRequest, handled
from udddm.config import RunConfig
from udddm.data import MapDataset
from udddm.errors import ConfigError, DataError, Diverged, Interrupted, LanesError, RankError, UdddmError, WorkerLost
from udddm.errors import picklable as picklable  # for launchers
from udddm.log import install, log
from udddm.order import check_world, most_lanes
from udddm.storage.threads import share_arena
from udddm.training.callbacks import Given
from udddm.training.rank import train_rank

NON_RETRYABLE = (ConfigError, DataError, Diverged, Interrupted)
"""Errors that another attempt would only repeat, and a requested stop, which must not be retried."""


@dataclass(frozen=True)
class Job:
    """A run, and the limits within which a launcher runs it."""

    config: RunConfig
    run_dir: str | Path
    """Directory or URL of the run."""
    dataset: MapDataset | Callable[[], MapDataset] | None = None
    """A data set, a function that returns one, or None to load `config.data`."""
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: tuple[int, int] = (1, 1)
    """The minimum and maximum number of workers."""
    max_failures: int = 0
    """Restarts after a lost or hung worker."""
    timeout: float = TIMEOUT
    """Seconds after which a collective counts as hung."""
    callbacks: Sequence[Given] = ()
    """Called on the first rank. With several workers, they are pickled, as the data set is."""
    extend: bool = False
    """Whether a shorter run in `run_dir` becomes longer (`udddm train --continue`)."""
    versions: dict[str, str] = field(default_factory=lambda: versions())
    """The driver's versions, which every worker must have."""
    lanes: int | None = None
    """The lanes of the run, once an attempt with a number of workers that does not divide them has found them."""
    log_level: int = field(default_factory=log.getEffectiveLevel)
    """The driver's level of the logger `udddm`, which new worker processes adopt."""

    def resolve_num_workers(self, available: int) -> int:
        """The largest requested number of workers that divides the lanes and is available. Raises ConfigError."""
        low, high = self.workers
        lanes = self.lanes or most_lanes(self.config.order, self.config.train.batch_size)
        for workers in range(min(high, available), low - 1, -1):
            if lanes % workers == 0:
                return workers
        if not any(lanes % workers == 0 for workers in range(low, high + 1)):
            check_world(lanes, high)
        raise ConfigError(
            f"--workers {low if low == high else f'{low}:{high}'}: {available} "
            f"worker{'' if available == 1 else 's'} can start here; request fewer, or add machines"
        )


def versions() -> dict[str, str]:
    """Versions that must be equal on a driver and its workers."""
    import udddm

    return {"udddm": udddm.__version__, "torch": torch.__version__, "Python": platform.python_version()}


def check_versions(expected: dict[str, str]) -> None:
    """Raise ConfigError, which names the differences, unless this process has the driver's versions."""
    differing = [f"{name} {versions()[name]} (driver: {v})" for name, v in expected.items() if versions()[name] != v]
    if differing:
        raise ConfigError(
            f"this worker ({platform.node()}) has different versions than the driver: {', '.join(differing)}; "
            "install the same environment on all machines"
        )


class Launcher(ABC):
    """A launcher. `--backend` names a class or function that is called without arguments and returns one."""

    @abstractmethod
    def available_workers(self, job: Job) -> int:
        """Returns the number of workers that can start now. May wait for machines. Raises ConfigError."""

    @abstractmethod
    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        """Run the job to completion with this number of workers, and return rank zero's result.

        Every worker sets the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, and MASTER_ADDR and
        MASTER_PORT, or `UDDDM_RENDEZVOUS` on one machine) and calls `run_rank`. A worker in a new process calls
        `start_logging` first. Raises the error of a rank, or WorkerLost.
        """

    def stop(self, signum: int) -> None:
        """Pass a request to stop on to the workers, which write a checkpoint and raise Interrupted.

        Called at most once, in a signal handler in the main thread, possibly before or between attempts. An attempt
        that fails afterwards is not repeated. By default, this stops immediately.
        """
        raise KeyboardInterrupt(signum)


def start_logging(job: Job) -> None:
    """Configure logging in a worker process as in the driver."""
    install(force=True, level=job.log_level)


def run_rank(job: Job, listener: Listener | None) -> dict[str, Any]:
    """Join the ranks that the environment describes, train this rank's part of the run, and return its result.

    Raises RankError if another rank is gone or does not respond within `job.timeout` seconds, ConfigError for different
    versions than the driver's, and the errors of training.
    """
    check_versions(job.versions)
    share_arena()
    needs_group = engines.find(job.config).needs_process_group
    lanes = most_lanes(job.config.order, job.config.train.batch_size)
    ranks = join(job.device, lanes, group=needs_group, timeout=job.timeout)
    failed = True
    try:
        dataset = job.dataset
        factory = isinstance(dataset, type) or (callable(dataset) and not hasattr(dataset, "__getitem__"))
        made = dataset() if factory else dataset  # type: ignore[operator,misc]
        result = train_rank(job.config, made, job.run_dir, ranks, listener, job.callbacks, extend=job.extend)  # type: ignore[arg-type]
        failed = False
        return result
    except Interrupted:  # all ranks have stopped after the same step
        failed = False
        raise
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise _out_of_memory(job.config, error) from error
        if ranks.world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RankError(f"another rank is gone, or did not respond within {job.timeout:.0f} s: {error}") from error
        raise
    finally:
        ranks.close(failed=failed)


def _out_of_memory(config: RunConfig, error: RuntimeError) -> ConfigError:
    parts = config.train.grad_accumulation
    reason = ". ".join(str(error).strip().partition("\n")[0].split(". ")[:3]).removesuffix(".")
    return ConfigError(
        f"out of memory ({reason}): set train.grad_accumulation={2 * parts} (it is {parts}), which splits each step "
        "into micro-batches with the same result; or use more --workers, a smaller network or train.precision=bf16"
    )


def root_cause(errors: list[BaseException]) -> BaseException:
    """Returns the error that most likely caused the others."""

    def order(error: BaseException) -> int:
        if isinstance(error, RankError):
            return 3
        if isinstance(error, WorkerLost):
            return 1
        return 0 if isinstance(error, UdddmError) else 2

    return min(errors, key=order)


def supervise(launcher: Launcher, job: Job, message: str = "") -> dict[str, Any]:
    """Run attempts until one succeeds or more than `max_failures` have failed. Raises the last error.

    `message` is logged before the first attempt starts.
    Raises Interrupted if a signal asked to stop: a worker that the signal ends before it trains is not a failure.
    """
    failures, stop = 0, StopRequest(launcher.stop)
    with handled(stop):
        while True:
            workers = job.resolve_num_workers(launcher.available_workers(job))
            if stop.signum:
                raise Interrupted(stop.signum)
            if message and not failures:
                log.info(message)
            try:
                return launcher.run_attempt(job, workers)
            except LanesError as error:
                if job.lanes is not None or job.config.order.lanes is not None:
                    raise
                job = replace(job, lanes=error.lanes)  # another number of workers may be possible
            except NON_RETRYABLE:
                raise
            except Exception as error:
                if stop.signum:
                    if isinstance(error, (WorkerLost, RankError)):
                        raise Interrupted(stop.signum) from error
                    raise
                failures += 1
                if failures > job.max_failures:
                    if job.max_failures:
                        error.add_note(f"this was failure {failures}; --max-failures is {job.max_failures}")
                    raise
                log.warning("failure %d of %d allowed: %s", failures, job.max_failures, error)
                log.info("restarting from the newest valid checkpoint")
