"""Small training runs as separate processes, for the scripts in this folder that stop, kill, move or starve them.

The processes are forked from one that has imported everything, so that a disturbance hits training instead of imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SETTINGS = (
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0.1, "
    "condition: none}",
    "order={lanes: 4, chunk: 32, window: 2}",
    "train={batch_size: 64, learning_rate: 0.001, ema: [0.99]}",
    "checkpoint.every_steps=7",
    "sample={every_steps: 0, final: 0}",
    "log_every_steps=5",
)
"""A run of a few milliseconds per step on the digits. `train.steps` is left to the script."""
PRELOADED = ["udddm.cli.train", "udddm.cli.store", "udddm.cli.sample", "udddm.api", "torch.utils.tensorboard"]
FORKS = multiprocessing.get_context("forkserver")

Fingerprints = dict[str, str]
Process = ForkServerProcess


def start_fork_server() -> None:
    """Call once, before any process is started and after the environment of all of them is set."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the fork server imports torch
    FORKS.set_forkserver_preload(PRELOADED)


def run_command(name: str, arguments: Sequence[str], log: str, environment: Mapping[str, str], where: str) -> None:
    """The child process: run `udddm NAME ARGUMENTS` with its output in a file."""
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.path[:0] = [place for place in environment.get("PYTHONPATH", "").split(":") if place]
    os.chdir(where)
    from udddm.cli.main import main

    sys.exit(main([name, *arguments]))


def start(
    name: str,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    where: Path = Path("/"),
) -> Process:
    """Start `udddm NAME ARGUMENTS` in the directory `where`, and append its output to `log`."""
    child = FORKS.Process(
        target=run_command, args=(name, list(arguments), str(log), dict(environment or {}), str(where))
    )
    child.start()
    return child


def wait(process: Process, seconds: float = 300) -> int:
    """The exit code: -9 if the process was killed, 999 (after killing it) if it has not ended in time."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return 999
    assert process.exitcode is not None
    return process.exitcode


def run(name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    return wait(start(name, arguments, log, environment))


def kill(process: Process) -> None:
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def train_arguments(run_dir: Path | str, *settings: str, store: str = "zarr", steps: int = 120) -> list[str]:
    """The arguments of `udddm train` for a tiny run; later settings win."""
    arguments = ["--run-dir", str(run_dir), "--device", "cpu", "--store", store]
    for setting in (*SETTINGS, f"train.steps={steps}", *settings):
        arguments += ["--set", setting]
    return arguments


def fingerprints(run_dir: Path) -> Fingerprints:
    """The SHA-256 of weights, averages and x0-state in `result.json`; empty if there is none."""
    file = run_dir / "result.json"
    if not file.exists():
        return {}
    return {key: value for key, value in json.loads(file.read_text()).items() if key.endswith("sha256")}


def errors(log: Path) -> list[str]:
    """The error lines of a log, and the word "traceback" if it contains one."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found = [line.strip() for line in lines if line.strip().startswith("error:")]
    return [*found, *(["traceback"] if any("Traceback" in line for line in lines) else [])]


def wait_until(condition: Callable[[], object], process: Process, seconds: float = 120) -> bool:
    """Whether the condition became true while the process lived."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not process.is_alive() or time.monotonic() > deadline:
            return bool(condition())
        time.sleep(0.01)
    return True


def training_starts(run_dir: Path, log: Path) -> Callable[[], bool]:
    return lambda: log.exists() and b"run directory" in log.read_bytes() and run_dir.exists()


def checkpoint_exists(run_dir: Path) -> Callable[[], bool]:
    return lambda: any(run_dir.glob("checkpoints/step-*/manifest.json"))
