"""A run that is paused beyond its lease, replaced by a second start, and continued.

    python benchmarks/robustness/paused_runs.py --json benchmarks/results/paused-runs.json

A first process is stopped at a random time (SIGSTOP), as a paused virtual machine or a swapping host is. The same run
is started a second time, and the first process is continued (SIGCONT) while the second trains or after it has finished.

- `s3-run`: the run directory is at an s3:// URL. The second start takes over once the lease has expired.
- `s3-store`: a local run directory with the store at an s3:// URL. The second start uses a copy of the directory.
- `local`: the lock of the directory does not expire, so the second start must be refused, and the first continues.

Nothing that the second process wrote may change, its fingerprints must equal those of an undisturbed run, and the first
must end with an error (`local`: the second). A lease lasts 60 s, so a trial takes about two minutes. Exits 1 unless all
trials pass.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tiny_runs

from udddm.storage import open_object_store
from udddm.testing import s3

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

KINDS = ("s3-run", "s3-store", "local")
LEASE_SECONDS = 60


@dataclass
class Trial:
    kind: str
    stopped_at: str
    """The newest checkpoint when the first process was stopped."""
    continued: str
    """Whether the first process was continued while the second trained or after it."""
    first: str = ""
    """The error with which the first process ended."""
    changed: int = 0
    """Objects or files of the second process that the first created, changed or deleted."""
    problems: list[str] = field(default_factory=list)


class Pair:
    """The two starts of a run."""

    def __init__(self, kind: str, place: Path, steps: int):
        place.mkdir()
        self.kind, self.place, self.steps = kind, place, steps
        self.url = f"s3://{s3.BUCKET}/{place.name}"
        self.logs = {name: place / f"{name}.log" for name in ("first", "second")}

    def run_dir(self, name: str) -> Path | str:
        if self.kind == "s3-run":
            return self.url
        return self.place / ("run" if self.kind == "local" or name == "first" else "copy")

    def start(self, name: str) -> tiny_runs.Process:
        more = ["--store-url", self.url] if self.kind == "s3-store" else []
        environment = {"UDDDM_SCRATCH": str(self.place / name)}
        command = [*tiny_runs.train_arguments(self.run_dir(name), steps=self.steps), *more]
        return tiny_runs.start("train", command, self.logs[name], environment)

    def said(self, name: str, words: str) -> bool:
        return self.logs[name].exists() and words in self.logs[name].read_text()

    def contents(self, name: str) -> dict[str, str]:
        """The SHA-256 of all files and objects of the run, except leases and locks."""
        found = {}
        if self.kind != "local":
            objects = open_object_store(self.url)
            found = {key: hashlib.sha256(objects.get(key)).hexdigest() for key in objects.sizes("")}
        if self.kind != "s3-run":
            run = Path(self.run_dir(name))
            files = [path for path in run.rglob("*") if path.is_file()]
            found |= {f"file {p.relative_to(run)}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        return {key: digest for key, digest in found.items() if "lease" not in key and not key.endswith(".lock")}

    def lease_holder(self) -> int:
        return int(json.loads(open_object_store(self.url).get("lease.json"))["pid"])

    def newest(self, name: str) -> str:
        names = [key.split("checkpoints/")[1].split("/")[0] for key in self.contents(name) if "checkpoints/step" in key]
        return max(names, default="none")

    def fingerprints(self, name: str) -> tiny_runs.Fingerprints:
        if self.kind != "s3-run":
            return tiny_runs.fingerprints(Path(self.run_dir(name)))
        (self.place / "result").mkdir(exist_ok=True)
        open_object_store(self.url).download("result.json", self.place / "result" / "result.json")
        return tiny_runs.fingerprints(self.place / "result")


def last_error(log: Path) -> str:
    return (tiny_runs.errors(log) or ["no error"])[-1]


def proceed(process: tiny_runs.Process) -> None:
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGCONT)


def trial(pair: Pair, delay: float, while_training: bool, expected: tiny_runs.Fingerprints) -> Trial:
    first = pair.start("first")
    tiny_runs.wait_until(lambda: pair.said("first", "run directory"), first)
    first.join(delay)
    if not first.is_alive() or first.pid is None:
        raise SystemExit(f"the first process ended too early:\n{pair.logs['first'].read_text()}")
    os.kill(first.pid, signal.SIGSTOP)
    try:
        row = Trial(pair.kind, pair.newest("first"), "while it trains" if while_training else "after its end")
        if pair.kind == "local":
            _refused(pair, row)
        else:
            if pair.kind == "s3-store":
                ignored = shutil.ignore_patterns(".lock")
                shutil.copytree(pair.run_dir("first"), pair.run_dir("second"), ignore=ignored)
            second = pair.start("second")
            if while_training:
                tiny_runs.wait_until(lambda: pair.lease_holder() != first.pid, second, 4 * LEASE_SECONDS)
                second.join(delay / 2)
                proceed(first)
            code = tiny_runs.wait(second)
            if code:
                row.problems.append(f"the second ended with {code}: {last_error(pair.logs['second'])}")
    finally:
        before = pair.contents("second")
        proceed(first)
    code = tiny_runs.wait(first)
    row.first = last_error(pair.logs["first"]).replace(str(pair.place.parent), "...")
    if pair.kind != "local":
        after = pair.contents("second")
        row.changed = len(before.items() ^ after.items())
        if row.changed:
            row.problems.append(f"{row.changed} objects changed, such as {min(before.items() ^ after.items())[0]}")
        if code != 1 or "traceback" in row.first:
            row.problems.append(f"the first ended with {code}: {row.first}")
    elif code:
        row.problems.append(f"the first ended with {code}: {row.first}")
    if pair.fingerprints("second") != expected:
        row.problems.append("other fingerprints")
    return row


def _refused(pair: Pair, row: Trial) -> None:
    """The second start in a local directory, which the first has locked."""
    before = pair.contents("second")
    code = tiny_runs.wait(pair.start("second"))
    if code != 2 or "another process is training" not in last_error(pair.logs["second"]):
        row.problems.append(f"the second ended with {code}: {last_error(pair.logs['second'])}")
    row.changed = len(before.items() ^ pair.contents("second").items())
    if row.changed:
        row.problems.append(f"the refused start changed {row.changed} files")


def compare(arguments: argparse.Namespace, directory: Path) -> list[Trial]:
    rng = random.Random(arguments.seed)
    calm = Pair("local", directory / "undisturbed", arguments.steps)
    process = calm.start("first")
    tiny_runs.wait_until(lambda: calm.said("first", "run directory"), process)
    began = time.monotonic()
    if tiny_runs.wait(process):
        raise SystemExit(f"the undisturbed run failed:\n{calm.logs['first'].read_text()}")
    longest, expected = time.monotonic() - began, calm.fingerprints("first")
    planned = [(kind, number) for kind in arguments.kinds for number in range(arguments.trials)]
    delays = {each: rng.uniform(0, 0.7 * longest) for each in planned}

    def one(each: tuple[str, int]) -> Trial:
        kind, number = each
        row = trial(
            Pair(kind, directory / f"{kind}-{number}", arguments.steps), delays[each], number % 2 == 0, expected
        )
        print(f"{kind:9}{row.stopped_at:15}{row.continued:16}{'; '.join(row.problems) or 'right'}", flush=True)
        return row

    with ThreadPoolExecutor(arguments.parallel) as pool:
        return list(pool.map(one, planned))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--trials", type=int, default=20, help="for each kind")
    parser.add_argument("--parallel", type=int, default=8, help="trials that run at the same time: they mostly wait")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times at which the first process is stopped")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    head = about()
    lines = [heading(head)]
    print(lines[0], flush=True)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        if set(arguments.kinds) != {"local"}:
            os.environ.update(stack.enter_context(s3.running()).environment())
        tiny_runs.start_fork_server()
        rows = compare(arguments, directory)
    lines.append(
        f"{'kind':10}{'trials':>7}{'passed':>7}{'objects changed':>17}  the error of the process that must end"
    )
    for kind in arguments.kinds:
        chosen = [row for row in rows if row.kind == kind]
        passed, changed = sum(not row.problems for row in chosen), sum(row.changed for row in chosen)
        said = "another process is training" if kind == "local" else chosen[0].first.partition(". ")[0]
        lines.append(f"{kind:10}{len(chosen):7}{passed:7}{changed:17}  {said}")
    print("\n".join(lines[1:]))
    write_report(arguments.json, head, {"trials": [asdict(row) for row in rows]}, lines)
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
