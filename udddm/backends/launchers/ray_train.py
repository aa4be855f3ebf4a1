"""Ray Train: workers on an existing Ray cluster, or on a local one that is started here.

Training runs in `run_rank`, as with every launcher. A small actor, the mailbox, carries messages between the workers
and the driver: stop requests, metrics, and each rank's result or error, which the driver returns or raises. `supervise`
restarts a run, not Ray, because the next attempt may have a different number of workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from udddm.backends.distributed.listener import Listener
from udddm.backends.launchers import inside_ray_job
from udddm.backends.launchers.base import Job, Launcher, picklable, root_cause, run_rank, start_logging
from udddm.errors import ConfigError, Interrupted, UdddmError, WorkerLost
from udddm.files import expanded
from udddm.log import log
from udddm.runs.remote import scratch
from udddm.storage import local_path
from udddm.training.progress import Line

RUNS = "UDDDM_RUNS"
"""Environment variable: the parent directory of relative run directories in a Ray job. Default: ~/udddm-runs."""
QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # those of Ray Train's controller; `_Watch.on_metrics` exports ours
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an extra process; SIGTERM and `supervise` handle preemption
    "RAY_TRAIN_V2_ENABLED": "1",
}


def _ray() -> Any:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.train
        import ray.train.torch
    except ImportError as error:
        raise ConfigError(f"--backend ray: importing Ray failed ({error}); pip install 'udddm[ray]'") from error
    return ray


def _check_answers(address: str) -> None:
    """Raise ConfigError if nothing listens at `host:port`, for which Ray would wait several minutes."""
    host, separator, port = address.rpartition(":")
    if not separator or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray cluster responds there ({error}); start it, or unset RAY_ADDRESS to "
            "start a local cluster"
        ) from error


class Mailbox:
    """The mailbox actor. `stopped` and `latest` return when there is something to report, so callers need not poll."""

    def __init__(self) -> None:
        self._stop, self._stopping = 0, asyncio.Event()
        self._latest, self._news = (0, 0, dict[str, float]()), asyncio.Event()
        self._outcomes: dict[int, Any] = {}

    async def stop(self, signum: int) -> None:
        self._stop = signum
        self._stopping.set()

    async def stopped(self) -> int:
        """Waits for a stop request, and returns its signal."""
        await self._stopping.wait()
        return self._stop

    async def metrics(self, step: int, total: int, values: dict[str, float]) -> None:
        self._latest = (step, total, values)
        self._news.set()

    async def latest(self) -> tuple[int, int, dict[str, float]]:
        """Waits for metrics that were not returned before, and returns the newest."""
        await self._news.wait()
        self._news.clear()
        return self._latest

    async def outcome(self, rank: int, value: Any) -> None:
        self._outcomes[rank] = value

    async def outcomes(self) -> dict[int, Any]:
        return self._outcomes


class _Watch(Listener):
    """The worker's end of the mailbox. It waits for stop requests in a thread, so that no step waits for them."""

    def __init__(self, ray: Any, mailbox: Any, rank: int):
        self._ray, self._mailbox, self._signal = ray, mailbox, 0
        self._gauges: dict[str, Any] = {}
        if rank == 0:
            threading.Thread(target=self._wait, name="stop request", daemon=True).start()

    def _wait(self) -> None:
        with contextlib.suppress(Exception):  # the mailbox is gone: the job is ending
            self._signal = self._ray.get(self._mailbox.stopped.remote())

    def stop_signal(self) -> int:
        return self._signal

    def on_metrics(self, step: int, total: int, values: dict[str, float]) -> None:
        self._mailbox.metrics.remote(step, total, values)
        for name, value in values.items():  # Ray's dashboard and its Prometheus endpoint
            if name not in self._gauges:
                self._gauges[name] = self._ray.util.metrics.Gauge(f"udddm_{name}", description=f"udddm-train: {name}")
            self._gauges[name].set(value)


def _worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray
    import ray.util.metrics

    job: Job = settings["job"]
    mailbox = settings["mailbox"]
    if Path(settings["cwd"]).is_dir():
        os.chdir(settings["cwd"])
    start_logging(job)
    rank = int(os.environ["RANK"])
    listener = _Watch(ray, mailbox, rank)
    try:
        value: Any = run_rank(job, listener)
    except UdddmError as error:
        value = picklable(error)
    ray.get(mailbox.outcome.remote(rank, value))


class RayTrain(Launcher):
    """Workers of Ray Train (`--backend ray`)."""

    def __init__(self) -> None:
        self._stopping = 0
        self._ray = _ray()
        if not self._ray.is_initialized():
            given = os.environ.get("RAY_ADDRESS", "")
            local = not given and not inside_ray_job()
            _check_answers(given)
            try:
                # Without an address, Ray looks for a cluster on this machine, and waits even for one that has crashed.
                self._ray.init(address="local" if local else None, log_to_driver=True, logging_level="ERROR")
            except (OSError, ValueError, RuntimeError, AssertionError) as error:
                raise ConfigError(_not_connected(given, error)) from error
            which = "a new local cluster (RAY_ADDRESS=auto joins an existing one)" if local else "the cluster"
            log.info(f"Ray {self._ray.__version__}: {which} at {self._ray.get_runtime_context().gcs_address}")

    def stop(self, signum: int) -> None:
        self._stopping = signum  # not sent from here: a signal may interrupt another call of Ray

    def _resources(self, job: Job) -> dict[str, float]:
        """The resources of one worker: one GPU if the cluster has any and the device is not cpu."""
        if job.device == "cuda" or (job.device == "auto" and self._ray.cluster_resources().get("GPU", 0) > 0):
            nodes = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
            return {"GPU": 1.0, "CPU": cpus_per_gpu(nodes)}
        return {"CPU": 1.0}

    def _fit(self, wanted: dict[str, float]) -> int:
        nodes = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
        return sum(int(min(node.get(kind, 0) // amount for kind, amount in wanted.items())) for node in nodes)

    def available_workers(self, job: Job) -> int:
        """Returns the number of workers that fit into the cluster.

        If they are fewer than requested, waits up to `timeout` seconds for the autoscaler or for a node to return. A
        local cluster cannot grow, so there is no wait. Raises ConfigError if too few workers fit.
        """
        wanted, least = self._resources(job), job.workers[0]
        available = self._fit(wanted)
        if available < least and (inside_ray_job() or os.environ.get("RAY_ADDRESS")):
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[wanted] * least)
            log.info(
                f"{available} of {least} workers with {wanted} fit into the cluster; waiting up to {job.timeout:.0f} s"
            )
            deadline = time.monotonic() + job.timeout
            while available < least and time.monotonic() < deadline:
                if self._stopping:
                    raise Interrupted(self._stopping)
                time.sleep(1)
                available = self._fit(wanted)
        if available < least:
            total = {k: v for k, v in self._ray.cluster_resources().items() if k in ("CPU", "GPU")}
            raise ConfigError(
                f"--workers {least}: each worker needs {wanted}, and the cluster has {total}, enough for {available}; "
                "request fewer workers, or add resources to the cluster"
            )
        return available

    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        resources = self._resources(job)
        run = job_directory(job.run_dir)
        job = replace(job, run_dir=run, device="cuda" if "GPU" in resources else "cpu")
        mailbox = self._ray.remote(num_cpus=0)(Mailbox).remote()
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"job": job, "mailbox": mailbox, "cwd": str(Path.cwd())},
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if "GPU" in resources else "gloo", timeout_s=max(1, round(job.timeout))
            ),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=Path(str(run)).name,
                storage_path=str(_ray_storage(run)),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            ),
        )
        lost: list[str] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                lost.append(_brief(error))  # not the error itself, whose traceback keeps Ray's controller alive

        thread = threading.Thread(target=fit, name="ray train", daemon=True)
        thread.start()
        self._watch(mailbox, thread)
        gc.collect()  # a leftover traceback would keep the controller alive and the workers' resources reserved
        outcomes = self._ray.get(mailbox.outcomes.remote())
        self._ray.kill(mailbox)
        errors = [o for o in outcomes.values() if isinstance(o, BaseException)]
        if errors and not (lost and not any(isinstance(e, UdddmError) for e in errors)):
            raise root_cause(errors)
        if lost:
            raise WorkerLost(lost[0])
        result = outcomes[0]
        assert isinstance(result, dict)
        return result

    def _watch(self, mailbox: Any, thread: threading.Thread) -> None:
        """Show progress and forward a request to stop to the mailbox, until the thread ends."""
        line, forwarded, news = Line(), False, mailbox.latest.remote()
        with contextlib.closing(line):
            while thread.is_alive():
                thread.join(0.5)
                if self._stopping and not forwarded:
                    self._ray.get(mailbox.stop.remote(self._stopping))
                    forwarded = True
                if self._ray.wait([news], timeout=0)[0]:
                    line.show(*self._ray.get(news))
                    news = mailbox.latest.remote()


def cpus_per_gpu(nodes: Sequence[Mapping[str, float]]) -> float:
    """The CPUs that a worker with one GPU requests: the smallest number of CPUs per GPU of any node.

    Ray sets OMP_NUM_THREADS to a worker's number of CPUs, so with one CPU its host work would run on one thread.
    """
    shares = [node.get("CPU", 0) // node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
    return max(1.0, min(shares, default=1.0))


def job_directory(where: str | Path) -> str | Path:
    """Returns a URL unchanged, and a run directory as an absolute path.

    In a Ray job, the working directory is a copy that is deleted with the job, so a relative run directory is placed
    below `UDDDM_RUNS`.
    """
    run = local_path(where)
    if run is None:
        return where
    if run.is_absolute() or not inside_ray_job():
        return run.absolute()
    return expanded(os.environ.get(RUNS, "~/udddm-runs")) / run


def _ray_storage(run: str | Path) -> Path:
    """The directory for the few bytes that Ray Train itself stores per run."""
    local = local_path(run)
    return scratch() / "ray" if local is None else local.with_name(f".{local.name}.ray")


def _not_connected(address: str, error: BaseException) -> str:
    reason = _brief(error).rstrip(".")
    if address:
        return (
            f"RAY_ADDRESS={address}: cannot connect to a Ray cluster ({reason}). Write auto for a cluster on this "
            "machine, or HOST:PORT of the head node (port 6379 unless it was set); or unset RAY_ADDRESS to start a "
            "local cluster"
        )
    long = "; set RAY_TMPDIR to a shorter path, such as /tmp" if "AF_UNIX path" in reason else ""
    return f"--backend ray: cannot start a local Ray cluster ({reason}){long}"


def _brief(error: BaseException) -> str:
    """The first three nonempty lines of Ray's long error message, at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500] or type(error).__name__
