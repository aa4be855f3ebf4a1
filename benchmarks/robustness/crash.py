"""Kill a training run repeatedly at random times, and compare its results with those of an uninterrupted run.

    python benchmarks/robustness/crash.py --kills 100 --stores zarr zarr-s3 --json benchmarks/results/crash.json

For each store, a run is made once uninterrupted. Then it is killed with SIGKILL at random times and restarted until it
finishes, and this is repeated from the beginning until the requested number of kills has hit a living run. All runs, of
all stores, must have the same fingerprints of weights, EMA and x0-state. Exits 1 if they do not.

The processes are forked from one that has imported everything, so that kills hit training instead of imports.
`zarr-s3` is the zarr store on a SeaweedFS server on the same machine. Uploads in progress at a kill are not visible, so
such kills count as training.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tiny_runs

from udddm.testing import s3

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

STORES = ("gpu", "pinned", "zarr", "zarr-s3")


def life(run: Path, store: str, dtype: str, steps: int, kill_after: float | None) -> int:
    """Start the run once and kill it after some seconds. Returns the exit code, -9 if the kill hit it alive."""
    arguments = tiny_runs.train_arguments(run, f"store.dtype={dtype}", store=store.removesuffix("-s3"), steps=steps)
    if store == "zarr-s3":
        arguments += ["--store-url", f"s3://{s3.BUCKET}/{run.name}"]
    process = tiny_runs.start("train", arguments, run.with_suffix(".log"))
    process.join(kill_after)
    tiny_runs.kill(process)
    assert process.exitcode is not None
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed with exit code {process.exitcode}:\n{run.with_suffix('.log').read_text()}")
    return process.exitcode


def leftovers(run: Path) -> set[Path]:
    return {p for p in run.rglob("*") if p.name.endswith(".partial")}


def phase(run: Path, before: set[Path], said: int) -> str:
    """What a killed process was doing, from the unfinished files that it left and its log starting at byte `said`."""
    names = {p.relative_to(run).parts[0] for p in leftovers(run) - before}
    if "checkpoints" in names:
        return "writing a checkpoint"
    if "state" in names:
        return "writing a chunk"
    spoken = run.with_suffix(".log").read_bytes()[said:]
    ready = b"resuming from" if (run / "checkpoints").exists() else b"run directory:"
    return "training" if ready in spoken else "starting"


PHASES = ("starting", "training", "writing a checkpoint", "writing a chunk")


@dataclass
class Row:
    store: str
    dtype: str
    seconds: float
    """Seconds of the uninterrupted run, including the start of its process."""
    fingerprints: tiny_runs.Fingerprints
    kills: int = 0
    finished: int = 0
    """Runs that were killed at least once and finished in the end."""
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    equal: bool = True


def measure(directory: Path, store: str, dtype: str, steps: int, kills: int, rng: random.Random) -> Row:
    undisturbed = directory / f"{store}-{dtype}"
    began = time.perf_counter()
    life(undisturbed, store, dtype, steps, None)
    row = Row(store, dtype, time.perf_counter() - began, tiny_runs.fingerprints(undisturbed))
    while row.kills < kills:
        run = directory / f"{store}-{dtype}-{row.finished}"
        hits = 0
        while True:
            before, log = leftovers(run), run.with_suffix(".log")
            said = log.stat().st_size if log.exists() else 0
            # From barely started to a third of the run, so that a run is killed several times.
            last = row.kills == kills
            if life(run, store, dtype, steps, None if last else rng.uniform(0, row.seconds / 3)) == 0:
                break
            hits += 1
            row.kills += 1
            row.phases[phase(run, before, said)] += 1
        if hits:
            row.finished += 1
            row.equal &= tiny_runs.fingerprints(run) == row.fingerprints
        shutil.rmtree(run)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="for each store")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16", "uint8"], default="fp16")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--directory", type=Path, help="directory for the runs (default: the system's temporary directory)"
    )
    arguments = parser.parse_args()
    with ExitStack() as stack:
        if "zarr-s3" in arguments.stores:
            os.environ.update(stack.enter_context(s3.running()).environment())
        tiny_runs.start_fork_server()  # inherits the environment
        return compare(arguments)


def compare(arguments: argparse.Namespace) -> int:
    rng = random.Random(arguments.seed)
    head = about()
    lines = [
        heading(head),
        f"{'store':8}{'kills that hit':>15}  = "
        + " + ".join(PHASES)
        + f"{'runs finished':>15}{'undisturbed':>13}  equal?",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.directory, ignore_cleanup_errors=True) as name:
        life(Path(name) / "warm-up", "gpu", arguments.dtype, 1, None)  # lets the fork server import everything once
        for store in arguments.stores:
            row = measure(Path(name), store, arguments.dtype, arguments.steps, arguments.kills, rng)
            rows.append(row)
            phases = "   ".join(f"{row.phases[name]:{len(name)}}" for name in PHASES)
            lines.append(
                f"{store:8}{row.kills:15}    {phases}{row.finished:15}"
                f"{row.seconds:11.1f} s  {'yes' if row.equal else 'NO'}"
            )
            print(lines[-1], flush=True)
    same = all(row.fingerprints == rows[0].fingerprints for row in rows)
    lines.append("")
    lines.append(f"weights, EMA and x0-state of these stores are {'the same' if same else 'DIFFERENT'}")
    print("\n".join(lines[-2:]))
    if arguments.json is not None:
        write_json(arguments.json, head, {"stores_agree": same, "rows": [asdict(row) for row in rows]})
    return 0 if same and all(row.equal for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
