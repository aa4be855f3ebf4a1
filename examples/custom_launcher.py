"""A launcher that starts the ranks with torchrun, like a scheduler that runs shell commands.

    PYTHONPATH=examples udddm-train --config digits --workers 2 --backend custom_launcher:Torchrun

A launcher runs one attempt at a job with a given number of workers, and raises the error that ended it.
`udddm.backends.launchers.supervise` handles the number of workers, restarts after failures, and `--max-failures`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from udddm.backends.launchers import Job, Launcher, run_rank
from udddm.backends.launchers.base import picklable, root_cause
from udddm.errors import WorkerLost


class Torchrun(Launcher):
    """Starts the ranks with `torchrun --standalone`."""

    def __init__(self) -> None:
        self._torchrun: subprocess.Popen[bytes] | None = None

    def available_workers(self, job: Job) -> int:
        """One worker per GPU of this machine, or the requested maximum on a CPU."""
        if job.device != "cpu" and torch.cuda.is_available():
            return torch.cuda.device_count()
        return max(job.workers)

    def stop(self, signum: int) -> None:
        """torchrun passes the signal on to the ranks, which write a checkpoint."""
        if self._torchrun is not None:
            self._torchrun.send_signal(signum)

    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="udddm-torchrun-") as place:
            (Path(place) / "job").write_bytes(pickle.dumps(job))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
            self._torchrun = subprocess.Popen([*command, __file__, place])
            try:
                code = self._torchrun.wait()
            except KeyboardInterrupt:  # a second signal
                self._torchrun.terminate()
                raise
            outcomes = [pickle.loads(path.read_bytes()) for path in sorted(Path(place).glob("rank-*"))]
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise root_cause(errors)
        if code or not outcomes:
            raise WorkerLost(f"torchrun ended with exit code {code}, and no rank reported an error")
        result: dict[str, Any] = outcomes[0]
        return result


def main(place: Path) -> int:
    """Run one rank in a process that torchrun started. Returns the exit code."""
    try:
        outcome: Any = run_rank(pickle.loads((place / "job").read_bytes()), None)
    except Exception as error:
        outcome = picklable(error)
    partial = place / f"partial-{os.environ['RANK']}"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(place / f"rank-{int(os.environ['RANK']):04d}")
    return int(isinstance(outcome, BaseException))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
