"""`ray job submit` end to end, with workers killed by SIGKILL at random times, and the results of the runs.

    python benchmarks/robustness/ray_kills.py --kills 20 --json benchmarks/results/ray-kills.json

A cluster is started (`ray start --head`). A job with two workers is submitted once uninterrupted and then repeatedly,
each time with a new run directory. At a random time after both workers have started, one of them is killed, again after
every restart, up to `--per-job` times per job. Every run must have the uninterrupted run's fingerprints of weights, EMA
and x0-state. Exits 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from udddm.testing.cluster import Cluster, running

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

SETTINGS = (
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0.1, "
    "condition: none}",
    "train={batch_size: 64, learning_rate: 0.001, ema: [0.9]}",
    "checkpoint.every_steps=7",
    "sample={every_steps: 0, final: 7}",
    "log_every_steps=5",
)


class Job:
    """A submitted run, whose log is collected in the background."""

    def __init__(self, cluster: Cluster, run: Path, steps: int, failures: int):
        command = ["udddm-train", "--device", "cpu", "--store", "zarr", "--workers", "2", "--run-dir", str(run)]
        for setting in (*SETTINGS, f"train.steps={steps}"):
            command += ["--set", setting]
        self.process: subprocess.Popen[str] = cluster.submit(*command, "--max-failures", str(failures))
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.log += self.process.stdout

    def end(self) -> None:
        if self.process.wait(600) != 0:
            raise SystemExit("the job failed:\n" + "".join(self.log))
        self._reader.join()


def fingerprints(run: Path) -> dict[str, str]:
    result = json.loads((run / "result.json").read_text())
    return {key: value for key, value in result.items() if key.endswith("sha256")}


def newest_step(run: Path) -> int:
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)


def group(cluster: Cluster, job: Job, before: set[int]) -> list[int]:
    """The two workers of the next attempt; none if the job has ended."""
    while job.process.poll() is None:
        found = [pid for pid in cluster.workers() if pid not in before]
        if len(found) == 2:
            return found
        time.sleep(0.05)
    return []


def disturb(
    cluster: Cluster, run: Path, arguments: argparse.Namespace, longest: float, rng: random.Random
) -> list[int]:
    """Run a job and kill a worker up to `per_job` times. Returns the newest checkpoint's step at every kill."""
    job = Job(cluster, run, arguments.steps, arguments.per_job)
    steps: list[int] = []
    before: set[int] = set()
    while len(steps) < arguments.per_job:
        workers = group(cluster, job, before)
        before |= set(workers)
        deadline = time.monotonic() + rng.uniform(0, longest)
        while job.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        victim = rng.choice(workers) if workers else 0
        if victim not in cluster.workers():
            break
        os.kill(victim, signal.SIGKILL)
        steps.append(newest_step(run))
    job.end()
    logged = sum(" allowed: " in line for line in job.log)
    print(f"  {run.name}: killed at checkpoints {steps}, {logged} failures logged", flush=True)
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-job", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rng = random.Random(arguments.seed)
    head = about("ray")
    lines = [heading(head)]
    print("\n".join(lines), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        place = Path(name)
        with running(place / "cluster", cpus=2) as cluster:
            calm = Job(cluster, place / "undisturbed", arguments.steps, 0)
            group(cluster, calm, set())
            began = time.monotonic()
            calm.end()
            longest = time.monotonic() - began
            expected = fingerprints(place / "undisturbed")
            while sum(len(row["steps_at_kills"]) for row in rows) < arguments.kills:
                run = place / f"run-{len(rows)}"
                # so that it is killed several times, both while workers start and while they train
                steps = disturb(cluster, run, arguments, longest * 0.6, rng)
                rows.append({"steps_at_kills": steps, "equal": fingerprints(run) == expected})
    kills = sum(len(row["steps_at_kills"]) for row in rows)
    equal = all(row["equal"] for row in rows)
    lines += [
        f"undisturbed, from its workers' start: {longest:.1f} s",
        f"{kills} workers killed in {len(rows)} jobs; newest checkpoint at each kill: "
        + ", ".join(str(step) for row in rows for step in row["steps_at_kills"]),
        f"weights, EMA and x0-state of every job {'equal' if equal else 'DIFFERENT from'} those of the undisturbed one",
    ]
    print("\n".join(lines[1:]))
    write_report(arguments.json, head, {"kills": kills, "equal": equal, "jobs": rows}, lines)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
