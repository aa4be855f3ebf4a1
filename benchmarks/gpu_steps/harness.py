"""Checks that run one after the other, each in a forked process with a wall limit.

The parent never uses a GPU, so a check begins with a CUDA context that no earlier check can have broken, and one that
hangs or crashes ends alone. The results file is replaced after every check, and whenever a check reports figures.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAST_LINES = {"failed": 15, "timeout": 60}
"""Lines of a check's output that are kept. A timeout has the stack of every thread."""
BAD = ("failed", "timeout")
STACKS = signal.SIGUSR1
"""At its limit a check gets this signal first, and writes the stacks of its threads."""


class Skipped(Exception):
    """Raised by a check that cannot run here. The message is the reason."""


@dataclass
class Bench:
    """What a check is given: where it runs, at what size, and where its figures go."""

    device: str
    """cpu or cuda."""
    small: bool
    root: Path
    """The repository."""
    scratch: Path
    """A directory for the check's files, empty at first."""
    log: Path = Path(os.devnull)
    """The check's standard output and standard error."""
    send: Callable[[dict[str, Any]], None] = field(default=lambda message: None)

    def report(self, **figures: Any) -> None:
        """Add figures to the results file. A check that is ended later keeps them."""
        self.send({"figures": figures})

    def pick(self, full: Any, small: Any) -> Any:
        """One of two sizes."""
        return small if self.small else full


@dataclass(frozen=True)
class Check:
    step: str
    """P0 to P12."""
    name: str
    limit: float
    """Seconds of wall time, after which the check and its processes are killed."""
    run: Callable[[Bench], None]
    cuda: str = ""
    """For what it needs CUDA, where it has nothing to do on a CPU."""

    @property
    def full_name(self) -> str:
        return f"{self.step}.{self.name}"


class Results:
    """The results file: `head`, and a record for each check."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.head = path, head
        self.checks: list[dict[str, Any]] = []

    def save(self) -> None:
        """Replace the file, so that a reader never sees a part of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".partial")
        temporary.write_text(json.dumps({**self.head, "checks": self.checks}, indent=1, default=str) + "\n")
        temporary.replace(self.path)


def perform(checks: Sequence[Check], bench: Bench, results: Results, seconds: float) -> None:
    """Run the checks in order. One whose limit does not fit what is left of `seconds` is skipped."""
    began = time.monotonic()
    for check in checks:
        left = seconds - (time.monotonic() - began)
        record: dict[str, Any] = {"step": check.step, "check": check.name, "status": "running", "limit": check.limit}
        results.checks.append(record)
        reason = ""
        if check.cuda and bench.device != "cuda":
            reason = f"needs CUDA: {check.cuda}"
        elif check.limit > left:
            reason = f"its limit of {check.limit:g} s does not fit the {left:.0f} s left of {seconds:.0f} s"
        if reason:
            record["status"], record["reason"] = "skipped", reason
            results.save()
        else:
            results.save()
            _one(check, bench, record, results)
        print(line(record), flush=True)


def line(record: dict[str, Any]) -> str:
    """A record in one line."""
    name = f"{record['step']}.{record['check']}"
    if record["status"] == "skipped":
        return f"{name:20} skipped         {record['reason']}"
    return f"{name:20} {record['status']:8} {record.get('seconds', 0):5.1f} s"


def _one(check: Check, bench: Bench, record: dict[str, Any], results: Results) -> None:
    place = bench.scratch / check.full_name
    place.mkdir()
    log = place / "log"
    own = Bench(bench.device, bench.small, bench.root, place, log)
    began = time.monotonic()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside numpy's threads, which survive one
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(check, own, writing)
    os.close(writing)
    try:
        status = _follow(pid, reading, began + check.limit, record, results)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):  # also what the check has started
            os.killpg(pid, signal.SIGKILL)
    record["seconds"] = round(time.monotonic() - began, 2)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [text.replace(f"{bench.root}/", "") for text in lines]
    if status is None:
        record["status"] = "timeout"
        record["error"] = [f"killed after its limit of {check.limit:g} s", *lines[-LAST_LINES["timeout"] :]]
    elif record["status"] == "running":  # it ended without a word
        number = -os.waitstatus_to_exitcode(status)
        how = f"killed by {signal.Signals(number).name}" if number > 0 else f"ended with exit code {-number}"
        record["status"], record["error"] = "failed", [how, *lines[-LAST_LINES["failed"] :]]
    elif record["status"] == "failed":
        own_lines = [text.replace(f"{bench.root}/", "") for text in record.get("error", [])]
        record["error"] = [*own_lines, *_context(lines)]
    shutil.rmtree(place, ignore_errors=True)
    results.save()


def _context(lines: list[str]) -> list[str]:
    """What a failed check had printed, marked as such."""
    kept = lines[-LAST_LINES["failed"] :]
    return ["its output ended with:", *kept] if kept else []


def _follow(pid: int, reading: int, deadline: float, record: dict[str, Any], results: Results) -> int | None:
    """Take messages until the child ends. Its wait status, or None for one that was killed at the deadline."""
    rest = b""
    ended: int | None = None
    while True:
        ready, _, _ = select.select([reading], [], [], 0.0 if ended is not None else 0.05)
        chunk = os.read(reading, 1 << 16) if ready else b""
        *whole, rest = (rest + chunk).split(b"\n")
        for message in whole:
            _take(json.loads(message), record)
        if whole:
            results.save()
        if chunk:
            continue
        if ended is not None:
            return ended
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended = status  # once more: what it sent last
        elif time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, STACKS)
                time.sleep(0.5)
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)  # in case it had no group yet
            os.waitpid(pid, 0)
            return None
        elif ready:  # the pipe is closed; it has yet to end
            time.sleep(0.02)


def _take(message: dict[str, Any], record: dict[str, Any]) -> None:
    for key, value in message.items():
        if key == "figures":
            record.setdefault("figures", {}).update(value)
        else:
            record[key] = value


def _child(check: Check, bench: Bench, writing: int) -> None:
    """The forked process. Does not return."""
    os.setsid()
    output = os.open(bench.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(file=2)
    faulthandler.register(STACKS, file=2)  # and not a timer: its thread would deadlock in processes forked later
    me = os.getpid()

    def send(message: dict[str, Any]) -> None:
        os.write(writing, json.dumps(message, default=str).encode() + b"\n")

    bench.send = send
    outcome: dict[str, Any] = {"status": "ok"}
    try:
        check.run(bench)
    except Skipped as reason:
        outcome = {"status": "skipped", "reason": str(reason)}
    except BaseException:
        lines = traceback.format_exc().splitlines()
        outcome = {"status": "failed", "error": lines[-LAST_LINES["failed"] :]}
    if os.getpid() == me:  # not a process that the check has forked
        send(outcome)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds, so that the check in progress is killed too."""

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
