"""A requested stop ends as a stop, whatever it meets: an attempt that fails afterwards is neither a failure nor
repeated."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from udddm.backends.launchers.base import Job, Launcher, supervise
from udddm.config import resolve
from udddm.errors import CheckpointError, Interrupted, RankError, UdddmError, WorkerLost


def interrupt(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


class Scripted(Launcher):
    """Each attempt runs the next of `script`."""

    def __init__(self, *script: Callable[[], Any], before: Callable[[int], None] = lambda attempt: None):
        self.script, self.before = list(script), before
        self.attempts, self.stopped = 0, [0]

    def available_workers(self, job: Job) -> int:
        self.before(self.attempts)
        return 1

    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        self.attempts += 1
        result: dict[str, Any] = self.script.pop(0)()
        return result

    def stop(self, signum: int) -> None:
        self.stopped = [signum]


def failing(error: UdddmError, signum: int = 0) -> Callable[[], Any]:
    def attempt() -> None:
        if signum:
            interrupt(signum)
        raise error

    return attempt


JOB = Job(resolve({}), Path("run"), max_failures=3)


@pytest.mark.parametrize("error", [WorkerLost("rank 0 was killed by SIGTERM"), RankError("another rank is gone")])
def test_a_rank_that_the_request_ends_before_it_trains_is_not_a_failure(error: UdddmError) -> None:
    launcher = Scripted(failing(error, signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command resumes") as raised:
        supervise(launcher, JOB)
    assert raised.value.exit_code == 143
    assert launcher.attempts == 1 and launcher.stopped == [signal.SIGTERM]


def test_a_request_between_two_attempts_is_not_forgotten() -> None:
    launcher = Scripted(failing(WorkerLost("killed")), before=lambda attempt: interrupt() if attempt else None)
    with pytest.raises(Interrupted):
        supervise(launcher, JOB)
    assert launcher.attempts == 1


def test_an_error_of_the_last_checkpoint_is_raised_as_it_is() -> None:
    launcher = Scripted(failing(CheckpointError("the disk is full"), signal.SIGINT))
    with pytest.raises(CheckpointError, match="the disk is full"):
        supervise(launcher, JOB)
    assert launcher.attempts == 1


def test_a_launcher_that_does_not_pass_requests_on_stops_immediately() -> None:
    class Plain(Scripted):
        stop = Launcher.stop

    with pytest.raises(KeyboardInterrupt):
        supervise(Plain(lambda: interrupt(signal.SIGHUP)), JOB)


def test_without_a_request_a_lost_worker_is_a_failure_that_is_repeated() -> None:
    launcher = Scripted(failing(WorkerLost("killed")), lambda: {"steps": 1})
    assert supervise(launcher, JOB) == {"steps": 1}
