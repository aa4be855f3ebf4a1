"""A disk that fills up at many places of a run.

    sudo python benchmarks/robustness/full_disk.py --json benchmarks/results/full-disk.json

Each trial runs on a tmpfs of limited size, or with a limited number of files, so that a different write fails: of the
first file, a chunk, a checkpoint, a metric, a picture, a score, the samples. The run must end with one error without a
traceback, or, if only files that a run can do without were lost, with none. With more room, the same command must then
resume to the fingerprints and samples of a run that always had room. Exits 1 unless all trials pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny_runs

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

FEATURES = "def flat(batch):\n    return batch.flatten(1)[:, :8]\n"
EVERYTHING = (
    "sample={every_steps: 6, final: 64}",
    "evaluate={every_steps: 15, count: 32, features: 'features:flat'}",
    "train.power_ema=[0.1]",
    "train.power_ema_every_steps=10",
)
CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "zarr store": ("zarr", (), "size"),
    "gpu store": ("gpu", (), "size"),
    "pictures, scores, averages": ("gpu", EVERYTHING, "size"),
    "number of files": ("zarr", EVERYTHING, "files"),
}
"""Store, settings, and what of the disk is limited."""
ROOM = "size=400m,nr_inodes=200000"


@dataclass
class Trial:
    case: str
    limit: int
    """KiB, or files."""
    exit_code: int
    checkpoint: str
    """The newest one when the disk was full."""
    error: str
    warnings: int
    problems: list[str]


@contextmanager
def disk(place: Path, options: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def used(place: Path) -> tuple[int, int]:
    """KiB and files in use on the disk."""
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024, found.f_files - found.f_ffree


class Case:
    def __init__(self, name: str, directory: Path, steps: int):
        self.name, self.directory, self.steps = name, directory, steps
        self.store, self.settings, self.limited = CASES[name]
        self.environment = {"PYTHONPATH": str(directory), "XDG_CACHE_HOME": str(directory / "cache")}

    def train(self, run: Path, log: Path) -> int:
        arguments = tiny_runs.train_arguments(run, *self.settings, store=self.store, steps=self.steps)
        return tiny_runs.wait(tiny_runs.start("train", arguments, log, self.environment, self.directory))

    def results(self, run: Path) -> dict[str, str]:
        samples = run / "samples.npy"
        return {**tiny_runs.fingerprints(run), "samples": samples.read_bytes().hex() if samples.exists() else ""}

    def measure(self) -> None:
        """The results with enough room, and the most that the run ever needs."""
        most, stopping = [0, 0], threading.Event()
        with disk(self.directory / "disk", ROOM) as place:

            def watch() -> None:
                while not stopping.wait(0.002):
                    most[:] = map(max, most, used(place))

            watcher = threading.Thread(target=watch)
            watcher.start()
            log = self.directory / "undisturbed.log"
            try:
                if self.train(place / "run", log):
                    raise SystemExit(f"the undisturbed run failed:\n{log.read_text()}")
            finally:
                stopping.set()
                watcher.join()
            self.expected = self.results(place / "run")
        self.most = most[self.limited == "files"]

    def trial(self, limit: int) -> Trial:
        options = f"size={limit}k" if self.limited == "size" else f"size=400m,nr_inodes={limit}"
        first, second = self.directory / f"{limit}-first.log", self.directory / f"{limit}-second.log"
        with disk(self.directory / "disk", options) as place:
            run = place / "run"
            code = self.train(run, first)
            found = tiny_runs.errors(first)
            problems = []
            if len(found) != (code != 0) or "traceback" in found or code not in (0, 1, 2):
                problems.append(f"exit code {code}: {found}")
            newest = max((p.name for p in run.glob("checkpoints/step-*")), default="none")
            subprocess.run(["mount", "-o", f"remount,{ROOM}", str(place)], check=True)
            if again := self.train(run, second):
                problems.append(f"with room, exit code {again}: {tiny_runs.errors(second)}")
            elif self.results(run) != self.expected:
                problems.append("other fingerprints or samples")
        warnings = sum("cannot write" in line for line in first.read_text().splitlines()) - (code != 0)
        error = found[0].replace(str(self.directory), "...") if found else ""
        return Trial(self.name, limit, code, newest, error, max(0, warnings), problems)

    def limits(self, count: int) -> list[int]:
        """From the least with which anything can be written to almost all that is needed."""
        least = 4 if self.limited == "size" else 2
        return sorted({round(least + (self.most * 0.98 - least) * i / (count - 1)) for i in range(count)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, nargs=4, default=[10, 6, 9, 6], help="trials for each of the four cases")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: mounting a tmpfs needs root")
    tiny_runs.start_fork_server()
    head = about()
    lines = [heading(head), f"{'case':28}{'limit':>12}  {'exit':>4}  {'checkpoint':15}{'warnings':>8}  outcome"]
    print("\n".join(lines), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for case_name, count in zip(CASES, arguments.places, strict=True):
            directory = Path(name) / case_name.replace(" ", "-")
            directory.mkdir()
            (directory / "features.py").write_text(FEATURES)
            case = Case(case_name, directory, arguments.steps)
            case.measure()
            for limit in case.limits(count):
                row = case.trial(limit)
                rows.append(row)
                unit = "KiB" if case.limited == "size" else "files"
                lines.append(
                    f"{row.case:28}{row.limit:6} {unit:5}  {row.exit_code:4}  {row.checkpoint:15}{row.warnings:8}  "
                    + ("; ".join(row.problems) or "resumed to equal fingerprints")
                )
                print(lines[-1], flush=True)
    lines.append(f"{len(rows)} places, {sum(not row.problems for row in rows)} passed; errors:")
    lines += [f"  {text}" for text in sorted({row.error for row in rows if row.error})]
    print("\n".join(lines[-20:]))
    write_report(arguments.json, head, {"trials": [asdict(row) for row in rows]}, lines)
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
