"""A launcher that starts the ranks with torchrun, as a scheduler that runs shell commands would.

    PYTHONPATH=examples udddm-train --config configs/digits.yaml --workers 2 --backend custom_launcher:Torchrun

A launcher runs one attempt at a job with a number of workers, and raises what ended it. Restarts after failures, the
number of workers and `--max-failures` are not its business: `udddm.backends.launchers.supervise` decides on them.
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
    def available_workers(self, job: Job) -> int:
        """One per GPU of this machine; on a CPU as many as are wanted."""
        if job.device != "cpu" and torch.cuda.is_available():
            return torch.cuda.device_count()
        return max(job.workers)

    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="udddm-torchrun-") as place:
            (Path(place) / "job").write_bytes(pickle.dumps(job))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
            finished = subprocess.run([*command, __file__, place], check=False)
            outcomes = [pickle.loads(path.read_bytes()) for path in sorted(Path(place).glob("rank-*"))]
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise root_cause(errors)
        if finished.returncode or not outcomes:
            raise WorkerLost(f"torchrun ended with exit code {finished.returncode}, and no rank reported an error")
        result: dict[str, Any] = outcomes[0]
        return result


def main(place: Path) -> int:
    """One rank: what torchrun starts."""
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
