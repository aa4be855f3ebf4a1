"""SIGTERM at random times of a run that samples, evaluates slowly and writes checkpoints.

    python benchmarks/robustness/stop_signals.py --json benchmarks/results/stop-signals.json

The signal goes to a run of one process, to the launcher of two workers, or to one of the two workers. The run must end
within 10 seconds with exit code 143, with a checkpoint of the step it names, and the same command must then finish with
the fingerprints of an undisturbed run. A scoring of the samples takes 20 seconds, and always one is in progress. Exits
1 unless all trials pass.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tiny_runs

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

LIMIT = 10.0  # seconds
TARGETS = ("one process", "launcher of two workers", "one of two workers")
FEATURES = (
    "import os, time\n"
    "def flat(batch):\n"
    "    time.sleep(20 * (os.environ.get('SLOW') == '1'))\n"
    "    return batch.flatten(1)[:, :8]\n"
)
SETTINGS = (
    "sample={every_steps: 5, final: 64}",
    "evaluate={every_steps: 6, count: 32, features: 'features:flat'}",
)


@dataclass
class Trial:
    target: str
    delay: float
    """Seconds from the start of the process to the signal."""
    phase: str
    seconds: float = 0.0
    """Seconds from the signal to the end."""
    step: int = 0
    """The step of the newest checkpoint."""
    problems: list[str] = field(default_factory=list)


class Lab:
    def __init__(self, directory: Path, steps: int):
        self.directory, self.steps = directory, steps
        (directory / "features.py").write_text(FEATURES)

    def start(self, run: Path, log: Path, workers: int, *, slow: bool) -> tiny_runs.Process:
        environment = {
            "PYTHONPATH": str(self.directory),  # also for the workers, which are new processes
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "SLOW": str(int(slow)),
        }
        more = ["--workers", str(workers)] if workers > 1 else []
        arguments = [*tiny_runs.train_arguments(run, *SETTINGS, steps=self.steps), *more]
        return tiny_runs.start("train", arguments, log, environment, self.directory)

    def undisturbed(self, workers: int) -> tuple[float, tiny_runs.Fingerprints]:
        run, log = self.directory / f"undisturbed-{workers}", self.directory / f"undisturbed-{workers}.log"
        began = time.monotonic()
        if tiny_runs.wait(self.start(run, log, workers, slow=False)):
            raise SystemExit(f"the undisturbed run failed:\n{log.read_text()}")
        return time.monotonic() - began, tiny_runs.fingerprints(run)

    def trial(self, target: str, name: str, delay: float, expected: tiny_runs.Fingerprints) -> Trial | None:
        """None if the run had finished before the signal."""
        run, first, second = (self.directory / f"{name}{suffix}" for suffix in ("", "-first.log", "-second.log"))
        workers = 1 if target == TARGETS[0] else 2
        process = self.start(run, first, workers, slow=True)
        process.join(delay)
        receivers = [process.pid or 0] if target != TARGETS[2] else workers_of(process.pid or 0)
        training = (run / "metrics.jsonl").exists()
        if not process.is_alive() or not receivers or (run / "result.json").exists():
            tiny_runs.kill(process)
            return None
        began, row = time.monotonic(), Trial(target, round(delay, 2), "training" if training else "starting")
        os.kill(receivers[-1], signal.SIGTERM)
        code = tiny_runs.wait(process, 60)
        row.seconds = round(time.monotonic() - began, 2)
        steps = [int(path.name[5:]) for path in run.glob("checkpoints/step-*") if (path / "manifest.json").exists()]
        row.step = max(steps, default=0)
        said = re.search(r"after step (\d+)", first.read_text())
        if code == 0:
            return None  # it had finished
        if code != 128 + signal.SIGTERM:
            row.problems.append(f"exit code {code}: {(first.read_text().splitlines() or ['silent'])[-1][:200]}")
        if row.seconds > LIMIT:
            row.problems.append(f"it took {row.seconds} s")
        if said and int(said[1]) != row.step:
            row.problems.append(f"the message names step {said[1]}, the newest checkpoint is of step {row.step}")
        if again := tiny_runs.wait(self.start(run, second, workers, slow=False)):
            row.problems.append(f"resumed with exit code {again}: {tiny_runs.errors(second)}")
        elif tiny_runs.fingerprints(run) != expected:
            row.problems.append("other fingerprints")
        return row


def workers_of(pid: int) -> list[int]:
    """The worker processes of a launcher, which are its children that run this Python."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs=3, default=[20, 8, 8], help="for each of the three targets")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the signals")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    tiny_runs.start_fork_server()
    rng = random.Random(arguments.seed)
    head = about()
    lines = [heading(head), f"{'signal to':25}{'after':>7}  {'phase':9}{'ended in':>9}{'checkpoint':>11}  outcome"]
    print("\n".join(lines), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        lab = Lab(Path(name), arguments.steps)
        for target, count in zip(TARGETS, arguments.trials, strict=True):
            longest, expected = lab.undisturbed(1 if target == TARGETS[0] else 2) if count else (0.0, {})
            done = tries = 0
            while done < count:
                tries += 1
                row = lab.trial(target, f"{target.replace(' ', '-')}-{tries}", rng.uniform(0.1, longest), expected)
                if row is None:
                    continue
                done += 1
                rows.append(row)
                outcome = "; ".join(row.problems) or "resumed to equal fingerprints"
                lines.append(
                    f"{target:25}{row.delay:5.1f} s  {row.phase:9}{row.seconds:7.1f} s{row.step:11}  {outcome}"
                )
                print(lines[-1], flush=True)
    passed, longest = sum(not row.problems for row in rows), max(row.seconds for row in rows)
    lines.append(f"{len(rows)} signals, {passed} passed; the longest end took {longest:.1f} s")
    print(lines[-1])
    write_report(arguments.json, head, {"trials": [asdict(row) for row in rows]}, lines)
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
