"""Runs and stores that were moved, copied or are reached by another name.

    python benchmarks/robustness/relocated_runs.py --json benchmarks/results/relocated-runs.json

Each way starts a run, kills it, changes where its files are or how they are named, and starts it again. It must either
resume to the fingerprints of an undisturbed run or refuse with one error; in both cases every other copy, and for a
refusal everything, must stay as it was, and the right command must then resume. Exits 1 unless all ways pass.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny_runs

from udddm.storage import open_object_store
from udddm.testing import s3

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

STEPS = 90
"""Three epochs. The runs are killed in the second, which reads chunks that the first has written."""
Place = Path | str


@dataclass
class Row:
    way: str
    outcome: str
    error: str
    problems: list[str]


def contents(place: Place) -> dict[str, str]:
    """The SHA-256 of every file or object, except leases and locks."""
    objects = open_object_store(str(place))
    keys = [key for key in objects.sizes("") if "lease" not in key and not key.endswith(".lock")]
    return {key: hashlib.sha256(objects.get(key)).hexdigest() for key in keys}


def copied(source: Place, target: Place) -> Place:
    """Copy all files or objects, as a tool would that knows nothing about them."""
    objects, copies = open_object_store(str(source)), open_object_store(str(target))
    for key in objects.sizes(""):
        if "lease" not in key and not key.endswith(".lock"):
            copies.put(key, objects.get(key))
    return target


def moved(source: Place, target: Place) -> Place:
    copied(source, target)
    open_object_store(str(source)).delete("")
    return target


class Lab:
    """One run that was killed, and what happens to it."""

    def __init__(self, directory: Path, expected: tiny_runs.Fingerprints):
        directory.mkdir()
        self.directory, self.expected, self.starts = directory, expected, 0
        self.problems: list[str] = []
        self.outcome = self.error = ""

    def url(self, name: str) -> str:
        return f"s3://{s3.BUCKET}/{self.directory.name}/{name}"

    def command(self, run: Place, store: Place | None) -> list[str]:
        more = [] if store is None else ["--store-url", str(store)]
        return [*tiny_runs.train_arguments(run, steps=STEPS), *more]

    def start(self, run: Place, store: Place | None, where: Path | None = None) -> tuple[tiny_runs.Process, Path]:
        self.starts += 1
        log = self.directory / f"{self.starts}.log"
        scratch = {"UDDDM_SCRATCH": str(self.directory / f"scratch-{self.starts}")}
        process = tiny_runs.start("train", self.command(run, store), log, scratch, where or self.directory)
        return process, log

    def interrupted(self, run: Place, store: Place | None = None, where: Path | None = None) -> None:
        """Start the run and kill it in its second epoch."""
        process, log = self.start(run, store, where)
        objects = open_object_store(str((where or self.directory) / run) if isinstance(run, Path) else run)
        tiny_runs.wait_until(lambda: objects.exists("checkpoints/step-00000035/manifest.json"), process)
        if not process.is_alive():
            raise SystemExit(f"the run ended too early:\n{log.read_text()}")
        tiny_runs.kill(process)

    def resumes(self, run: Place, store: Place | None = None, where: Path | None = None, intact: Place = "") -> None:
        """The run must resume to the expected fingerprints and leave the files at `intact` as they are."""
        before = contents(intact) if intact else {}
        process, log = self.start(run, store, where)
        code = tiny_runs.wait(process)
        self.outcome += (", then resumed" if self.outcome else "resumed") if code == 0 else "FAILED"
        if code:
            self.problems.append(f"exit code {code}: {tiny_runs.errors(log)}")
        elif "resuming from" not in log.read_text():
            self.problems.append("started from the beginning")
        elif self.fingerprints(run, where) != self.expected:
            self.problems.append("other fingerprints")
        if intact and contents(intact) != before:
            self.problems.append(f"{intact} was changed")

    def refuses(self, run: Place, store: Place | None, *intact: Place) -> None:
        """The run must end with one error, and the files of all these places must stay as they are."""
        before = [contents(place) for place in intact]
        process, log = self.start(run, store)
        code, found = tiny_runs.wait(process), tiny_runs.errors(log)
        self.outcome, self.error = "refused", found[0].replace(str(self.directory), "...") if found else ""
        if code not in (1, 2) or len(found) != 1:
            self.problems.append(f"not refused: exit code {code}, {found}")
        for place, was in zip(intact, before, strict=True):
            if changed := contents(place).items() ^ was.items():
                self.problems.append(f"{place} was changed: {min(changed)[0]}")

    def fingerprints(self, run: Place, where: Path | None) -> tiny_runs.Fingerprints:
        if isinstance(run, Path):
            return tiny_runs.fingerprints((where or self.directory) / run)
        open_object_store(run).download("result.json", self.directory / "result.json")
        return tiny_runs.fingerprints(self.directory)


def run_moved(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run")
    (lab.directory / "run").rename(lab.directory / "moved")
    lab.resumes(lab.directory / "moved")


def run_copied(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run")
    shutil.copytree(lab.directory / "run", lab.directory / "copy")
    lab.resumes(lab.directory / "copy", intact=lab.directory / "run")
    lab.resumes(lab.directory / "run", intact=lab.directory / "copy")


def run_linked(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run")
    (lab.directory / "link").symlink_to(lab.directory / "run")
    lab.resumes(lab.directory / "link")


def run_relative(lab: Lab) -> None:
    (lab.directory / "other").mkdir()
    lab.interrupted(Path("run"), Path("state"))
    lab.resumes(Path("../run"), Path("../state"), where=lab.directory / "other")


def run_mounted(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run")
    (lab.directory / "mount").mkdir()
    subprocess.run(["mount", "--bind", lab.directory / "run", lab.directory / "mount"], check=True)
    try:
        lab.resumes(lab.directory / "mount")
    finally:
        subprocess.run(["umount", lab.directory / "mount"], check=True)


def store_moved_with_run(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run", lab.directory / "state")
    (lab.directory / "new").mkdir()
    for name in ("run", "state"):
        (lab.directory / name).rename(lab.directory / "new" / name)
    lab.resumes(lab.directory / "new" / "run", lab.directory / "new" / "state")


def store_moved_unsaid(lab: Lab) -> None:
    run, state, new = (lab.directory / name for name in ("run", "state", "new"))
    lab.interrupted(run, state)
    state.rename(new)
    lab.refuses(run, state, run, new)
    shutil.rmtree(state, ignore_errors=True)
    lab.resumes(run, new)


def store_of_another_run(lab: Lab) -> None:
    run, state, kept = (lab.directory / name for name in ("run", "state", "kept"))
    lab.interrupted(run, state)
    state.rename(kept)
    lab.interrupted(lab.directory / "other", state)
    lab.refuses(run, state, run, state, kept)
    lab.resumes(run, kept, intact=state)


def store_copied_in_part(lab: Lab) -> None:
    run, state, part = (lab.directory / name for name in ("run", "state", "part"))
    lab.interrupted(run, state)
    copied(state, part)
    for chunk in part.glob("gen-*/c/1/3/0/0/0"):
        chunk.unlink()
    lab.resumes(run, part, intact=state)  # from the location that the checkpoint names


def store_at_another_prefix(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run", lab.url("state"))
    lab.resumes(lab.directory / "run", copied(lab.url("state"), lab.url("copy")), intact=lab.url("state"))


def store_by_another_scheme(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run", lab.url("state"))
    lab.resumes(lab.directory / "run", lab.url("state").replace("s3://", "s3a://"))


def store_downloaded(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run", lab.url("state"))
    lab.resumes(lab.directory / "run", copied(lab.url("state"), lab.directory / "state"), intact=lab.url("state"))


def store_uploaded(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run", lab.directory / "state")
    lab.resumes(lab.directory / "run", moved(lab.directory / "state", lab.url("state")))


def remote_run_copied(lab: Lab) -> None:
    lab.interrupted(lab.url("run"))
    lab.resumes(copied(lab.url("run"), lab.url("copy")), intact=lab.url("run"))


def remote_run_downloaded(lab: Lab) -> None:
    lab.interrupted(lab.url("run"))
    lab.resumes(copied(lab.url("run"), lab.directory / "run"), intact=lab.url("run"))


def run_uploaded(lab: Lab) -> None:
    lab.interrupted(lab.directory / "run")
    lab.resumes(copied(lab.directory / "run", lab.url("run")), intact=lab.directory / "run")


WAYS: dict[str, Callable[[Lab], None]] = {
    "run directory moved": run_moved,
    "run directory copied, both resumed": run_copied,
    "run directory by a symbolic link": run_linked,
    "run directory by a bind mount": run_mounted,
    "run and store by relative paths, from another folder": run_relative,
    "run and separate store moved": store_moved_with_run,
    "store moved, its old location given": store_moved_unsaid,
    "another run's store at the old location": store_of_another_run,
    "store copied in part": store_copied_in_part,
    "store at s3:// copied to another prefix": store_at_another_prefix,
    "store at s3://, named s3a://": store_by_another_scheme,
    "store at s3:// downloaded": store_downloaded,
    "local store moved to s3://": store_uploaded,
    "run at s3:// copied to another prefix": remote_run_copied,
    "run at s3:// downloaded": remote_run_downloaded,
    "local run uploaded to s3://": run_uploaded,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only ways that contain one of these")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    head = about()
    lines = [heading(head)]
    print(lines[0], flush=True)
    rows = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        os.environ.update(stack.enter_context(s3.running()).environment())
        tiny_runs.start_fork_server()
        calm = directory / "undisturbed"
        if tiny_runs.run("train", tiny_runs.train_arguments(calm, steps=STEPS), directory / "undisturbed.log"):
            raise SystemExit((directory / "undisturbed.log").read_text())
        expected = tiny_runs.fingerprints(calm)
        for number, (way, change) in enumerate(WAYS.items()):
            if arguments.only and not any(word in way for word in arguments.only):
                continue
            if change is run_mounted and os.geteuid() != 0:
                lines.append(f"{way:55}skipped: it needs root")
            else:
                lab = Lab(directory / f"way-{number}", expected)
                change(lab)
                rows.append(Row(way, lab.outcome, lab.error, lab.problems))
                lines.append(f"{way:55}{'; '.join(lab.problems) or lab.outcome}")
            print(lines[-1], flush=True)
    lines.append(f"{len(rows)} ways, {sum(not row.problems for row in rows)} passed; refusals:")
    lines += [f"  {row.way}:\n    {row.error}" for row in rows if row.error]
    print("\n".join(lines[len(rows) + 1 :]))
    write_report(arguments.json, head, {"ways": [asdict(row) for row in rows]}, lines)
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
