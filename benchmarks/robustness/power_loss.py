"""Power losses on real file systems: a run continues from what is on the disk, and what has finished is there.

    sudo python benchmarks/robustness/power_loss.py --json benchmarks/results/power-loss.json

For every trial a file system is made in an image and mounted through a loop device. A run starts on it. At a random
instant its process is killed and the image is copied as it is, without what the page cache still holds: the disk after
a power loss. The copy is mounted, `udddm store verify` must find the run valid, and the same command must continue it
to the fingerprints and samples of an undisturbed run. The file systems write back on their own as late as they can
(`commit=300`), so that nothing is on the disk that was not synced.

Further trials cut the power at the end: as soon as the command has exited, and 3 seconds later. Every file of the run
must then be on the disk, with the bytes that it had in memory, and the same command must report a finished run.

Needs root and loop devices; exits 1 unless all trials pass.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny_runs

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

FILE_SYSTEMS = {
    "ext4": (["mkfs.ext4", "-q", "-F"], "loop,commit=300", 128),
    "xfs": (["mkfs.xfs", "-q", "-f"], "loop", 320),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], "loop,commit=300", 256),
}
"""Command, mount options, MiB."""
CUTS = ("random", "at the end", "3 s later")


@dataclass
class Trial:
    file_system: str
    cut: str
    before: str
    """The newest checkpoint that the running system saw."""
    after: str
    """The newest checkpoint on the disk."""
    problems: list[str]


@contextmanager
def mounted(image: Path, place: Path, options: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", options, str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def newest(run: Path) -> str:
    return max((p.name for p in run.glob("checkpoints/step-*") if (p / "manifest.json").exists()), default="none")


def contents(run: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run, by its name."""
    files = (p for p in run.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Trials:
    def __init__(self, directory: Path, arguments: argparse.Namespace):
        self.directory, self.steps, self.rng = directory, arguments.steps, random.Random(arguments.seed)
        began = time.monotonic()
        self.expected = self.undisturbed(directory / "undisturbed")
        self.longest = time.monotonic() - began

    def command(self, run: Path) -> list[str]:
        return tiny_runs.train_arguments(run, "sample.final=64", steps=self.steps)

    def undisturbed(self, run: Path) -> dict[str, str]:
        log = run.with_suffix(".log")
        if tiny_runs.run("train", self.command(run), log):
            raise SystemExit(f"the undisturbed run failed:\n{log.read_text()}")
        return self.results(run)

    def results(self, run: Path) -> dict[str, str]:
        samples = run / "samples.npy"
        digest = hashlib.sha256(samples.read_bytes()).hexdigest() if samples.exists() else "missing"
        return {**tiny_runs.fingerprints(run), "samples": digest}

    def trial(self, name: str, file_system: str, cut: str, delay: float) -> Trial:
        make, options, size = FILE_SYSTEMS[file_system]
        place = self.directory / name
        place.mkdir()
        image, copy = place / "image", place / "copy"
        with image.open("wb") as file:
            file.truncate(size << 20)
        subprocess.run([*make, str(image)], check=True, stdout=subprocess.DEVNULL)
        problems: list[str] = []
        with mounted(image, place / "mount", options) as disk:
            run = disk / "run"
            process = tiny_runs.start("train", self.command(run), place / "first.log")
            if cut == "random":
                tiny_runs.wait_until(tiny_runs.training_starts(run, place / "first.log"), process)
                process.join(delay)
                tiny_runs.kill(process)
            elif code := tiny_runs.wait(process):
                problems.append(f"the first run ended with exit code {code}")
            elif cut == "3 s later":
                time.sleep(3)
            subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
            before, written = newest(run), contents(run)
        with mounted(copy, place / "mount", "loop") as disk:
            run = disk / "run"
            after = newest(run)
            if cut != "random":
                found = contents(run)
                problems += [f"{each} is not as it was" for each in written if found.get(each) != written[each]]
            if after != "none" and tiny_runs.run("store", ["verify", str(run)], place / "verify.log"):
                problems.append(f"verify: {(place / 'verify.log').read_text().splitlines()[-1]}")
            if code := tiny_runs.run("train", self.command(run), place / "second.log"):
                problems.append(f"exit code {code}: {tiny_runs.errors(place / 'second.log')}")
            elif self.results(run) != self.expected:
                problems.append("other fingerprints or samples")
            elif cut != "random" and "finished" not in (place / "second.log").read_text():
                problems.append("the finished run was continued")
        shutil.rmtree(place)
        return Trial(file_system, cut, before, after, problems)

    def all(self, file_system: str, trials: int, ends: int) -> list[Trial]:
        rows = []
        for number, cut in enumerate(["random"] * trials + list(CUTS[1:]) * ends):
            delay = self.rng.uniform(0, self.longest)
            try:
                rows.append(self.trial(f"{file_system}-{number}", file_system, cut, delay))
            except subprocess.CalledProcessError as error:
                rows.append(Trial(file_system, cut, "", "", [f"{error.cmd[0]} failed: the disk could not be mounted"]))
            if rows[-1].problems:
                print(f"{file_system}, {cut}: {'; '.join(rows[-1].problems)}", flush=True)
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file-systems", nargs="+", choices=FILE_SYSTEMS, default=list(FILE_SYSTEMS))
    parser.add_argument("--trials", type=int, default=20, help="power losses at random instants, for each file system")
    parser.add_argument("--ends", type=int, default=3, help="power losses at each of the two times after the end")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants")
    parser.add_argument("--directory", type=Path, help="directory for the images (default: in memory)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        raise SystemExit("error: power losses are simulated on loop devices, which needs root")
    if missing := [name for name in arguments.file_systems if shutil.which(FILE_SYSTEMS[name][0][0]) is None]:
        raise SystemExit(
            f"error: no mkfs for {', '.join(missing)}: install xfsprogs and btrfs-progs, or --file-systems"
        )
    tiny_runs.start_fork_server()
    head = about()
    lines = [heading(head)]
    print(lines[0], flush=True)
    memory = Path("/dev/shm")
    where = arguments.directory or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as name:
        trials = Trials(Path(name), arguments)
        with ThreadPoolExecutor() as pool:
            results = pool.map(lambda each: trials.all(each, arguments.trials, arguments.ends), arguments.file_systems)
            rows = [row for found in results for row in found]
    lines.append(f"{'file system':12}{'cut':12}{'trials':>7}{'passed':>7}{'newest checkpoint not on the disk':>35}")
    for file_system in arguments.file_systems:
        for cut in CUTS:
            chosen = [row for row in rows if (row.file_system, row.cut) == (file_system, cut)]
            if chosen:
                passed = sum(not row.problems for row in chosen)
                behind = sum(row.before != row.after for row in chosen)
                lines.append(f"{file_system:12}{cut:12}{len(chosen):7}{passed:7}{behind:35}")
    print("\n".join(lines[1:]))
    write_report(arguments.json, head, {"trials": [asdict(row) for row in rows]}, lines)
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
