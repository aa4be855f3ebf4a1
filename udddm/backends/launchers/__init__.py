"""Launchers, which start the processes of a run, selected by name (`--backend`)."""

from __future__ import annotations

import os

from udddm.backends import engines
from udddm.backends.distributed.ranks import from_launcher
from udddm.backends.launchers.base import Job, Launcher, run_rank, start_logging, supervise
from udddm.backends.launchers.local import end_if_importing
from udddm.config.plugins import LAUNCHERS
from udddm.errors import ConfigError
from udddm.runs.result import TrainResult

__all__ = ["Job", "Launcher", "choose", "inside_ray_job", "launch", "run_rank", "start_logging", "supervise"]


def inside_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "RAY_JOB_ID" in os.environ


def choose(backend: str, job: Job) -> tuple[str, str] | None:
    """Resolve `backend` (auto, or the name of a launcher) to the name of a launcher, and the reason for the choice.

    Returns None if nothing needs to be launched: this process is the only rank, or one of the ranks that torchrun,
    Slurm or another launcher started.
    """
    ranked = from_launcher() is not None
    if backend == "auto" and not ranked and inside_ray_job():
        return "ray", "this is a Ray job"
    if backend not in ("auto", "local"):
        return backend, "requested"
    if ranked or (job.workers == (1, 1) and not job.max_failures):
        return None
    return "local", "several workers on this machine" if max(job.workers) > 1 else "restarts after failures"


def launch(job: Job, backend: str = "auto") -> TrainResult:
    """Run a job with the launcher that `backend` selects.

    Raises ConfigError before anything starts, or the error that ended the job.
    """
    end_if_importing()
    launched = from_launcher()
    engines.find(job.config).check(job.config, launched[1] if launched else job.resolve_num_workers(job.workers[1]))
    chosen = choose(backend, job)
    if chosen is None:
        return TrainResult.from_dict(run_rank(job, None))
    name, why = chosen
    launcher = LAUNCHERS.load(name)()
    if not isinstance(launcher, Launcher):
        raise ConfigError(
            f"--backend {name}: it returned a {type(launcher).__name__}; give a class or function that returns a "
            "udddm.backends.launchers.Launcher"
        )
    return TrainResult.from_dict(supervise(launcher, job, f"backend: {name} ({why})"))
