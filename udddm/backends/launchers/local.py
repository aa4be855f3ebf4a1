"""Several ranks on this machine, as child processes that rendezvous through a file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from udddm.backends.distributed.ranks import RENDEZVOUS
from udddm.backends.distributed.signals import STOPPING
from udddm.backends.launchers.base import Job, Launcher, picklable, root_cause, run_rank, start_logging
from udddm.errors import ConfigError, Interrupted, RankError, WorkerLost
from udddm.storage.threads import abandoned

GRACE = 20.0
"""Seconds that the other ranks get to exit after one has failed."""
STOPPING_GRACE = 5.0
"""The same after a stop request: without the lost rank, the others cannot write a checkpoint."""

_UNGUARDED = 77
"""Exit code of a worker whose script starts workers at import."""


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _child(job: Job, rank: int, world: int, rendezvous: str, outcome: Connection) -> None:
    os.setpgid(0, 0)  # Ctrl-C then reaches only the parent, which forwards it once
    parent = multiprocessing.parent_process()
    assert isinstance(parent, BaseProcess)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    )
    os.environ[RENDEZVOUS] = rendezvous
    _imported(Path(rendezvous).parent, rank).touch()
    start_logging(job)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        outcome.send(run_rank(job, None))
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        outcome.send(picklable(error))
    outcome.close()
    if abandoned():
        os._exit(0)


def _imported(place: Path, rank: int) -> Path:
    """A file that exists once the process of a rank has imported the script."""
    return place / f"imported-{rank}"


def end_if_importing() -> None:
    """End this process, with a code that its parent recognizes, if it is a worker that is importing the script."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_UNGUARDED)


def _check_startable(job: Job) -> None:
    """Raise ConfigError if workers could not start: they import the script and unpickle the job."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and not Path(script).exists():
        raise ConfigError(
            f"workers import the program that starts them, but {script} is not a file: save the program as a "
            "script and run it, or use the command udddm-train"
        )
    try:
        pickle.dumps(job)
    except Exception as error:  # pickling fails with PicklingError, TypeError, AttributeError and others
        raise ConfigError(
            f"the data set cannot be sent to a worker ({error}): pass a function at the top level of a module that "
            "returns it, which every worker calls"
        ) from None


class Processes(Launcher):
    """Workers as child processes of this one (`--backend local`)."""

    def __init__(self) -> None:
        self._children: list[BaseProcess] = []
        self._stopping = 0

    def stop(self, signum: int) -> None:
        """Send the signal to the ranks. Those that already train agree on a step; the others end."""
        self._stopping = signum
        for child in self._children:
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, signum)

    def available_workers(self, job: Job) -> int:
        _check_startable(job)
        if job.device == "cpu":
            return max(job.workers)
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else max(job.workers)

    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        spawn = multiprocessing.get_context("spawn")
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        with tempfile.TemporaryDirectory(prefix="udddm-") as place:
            pipes: list[Connection] = []
            children = self._children = []
            previous = os.environ.get("OMP_NUM_THREADS")
            os.environ.setdefault("OMP_NUM_THREADS", threads)  # read when the children import torch
            try:
                with _sigint_blocked():
                    for rank in range(workers):
                        ours, theirs = spawn.Pipe(duplex=False)
                        arguments = (job, rank, workers, str(Path(place) / "rendezvous"), theirs)
                        started = spawn.Process(target=_child, args=arguments, name=f"rank {rank}")
                        started.start()
                        theirs.close()
                        pipes.append(ours)
                        children.append(started)
                if self._stopping:  # the ranks that started before the request have not received it
                    raise Interrupted(self._stopping)
                outcomes = _collect(pipes, children, lambda: bool(self._stopping), self.stop)
                for child in children:  # the outcomes have arrived; wait for the exit only
                    child.join(GRACE)
                for rank, outcome in enumerate(outcomes):
                    if isinstance(outcome, WorkerLost) and not _imported(Path(place), rank).exists():
                        outcomes[rank] = _lost_at_import(outcome, children[rank])
            finally:
                if previous is None:
                    os.environ.pop("OMP_NUM_THREADS", None)
                for child in children:
                    if child.is_alive():
                        child.kill()
                    child.join()
        errors = [o for o in outcomes if isinstance(o, BaseException)]
        if errors:
            raise root_cause(errors)
        result = outcomes[0]
        assert isinstance(result, dict)
        return result


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT, also in the processes that start meanwhile, until they unblock it.

    Ctrl-C reaches new processes as well, and would end each with a traceback while it imports its modules.
    """
    resource_tracker.ensure_running()  # starting it changes the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(
    pipes: list[Connection],
    children: Sequence[BaseProcess],
    stopping: Callable[[], bool] = lambda: False,
    stop: Callable[[int], None] = lambda signum: None,
) -> list[Any]:
    """Every rank's result or error. After the first error, the other ranks are killed after `GRACE` seconds, or
    `STOPPING_GRACE` if it is a lost rank while `stopping()`.

    A rank that training has not reached yet is ended by a signal that asks to stop, which `stop` then sends to the
    others.
    """
    outcomes: list[Any] = [None] * len(pipes)
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline: float | None = None
    while open_pipes:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(open_pipes), left)
        if not ready:
            for rank in open_pipes.values():
                children[rank].kill()
                outcomes[rank] = RankError(
                    f"rank {rank} did not exit within {GRACE:.0f} s after the failure of another rank"
                )
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank, lost = open_pipes.pop(pipe), False
            try:
                outcomes[rank] = pipe.recv()
            except EOFError:
                children[rank].join()
                code, lost = children[rank].exitcode or 0, True
                if -code in STOPPING and not stopping():
                    stop(-code)
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
                outcomes[rank] = _unguarded() if code == _UNGUARDED else WorkerLost(f"rank {rank} {how}")
                if -code in STOPPING:
                    outcomes[rank] = Interrupted(-code)
            if isinstance(outcomes[rank], BaseException) and deadline is None:
                deadline = time.monotonic() + (STOPPING_GRACE if lost and stopping() else GRACE)
    return outcomes


def _lost_at_import(lost: WorkerLost, child: BaseProcess) -> Exception:
    """The error of a worker that ended before its rank began. It is not repeated unless a signal ended the worker."""
    if (child.exitcode or 0) < 0:
        return lost
    return ConfigError(
        f"{lost} while it imported the script, which every worker does: its error is above. Move everything that only "
        'the first process should do under `if __name__ == "__main__":`'
    )


def _unguarded() -> ConfigError:
    return ConfigError(
        "udddm.train with several workers must not run at import, because every worker imports the script: move the "
        'call under `if __name__ == "__main__":`'
    )
