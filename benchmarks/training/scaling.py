"""Images/s with 1 and 2 workers, each pinned to a core, for each launcher, and the cost of Ray relative to torchrun.

    python benchmarks/training/scaling.py --json benchmarks/results/scaling.json

The same run, with the same global batch and therefore the same samples and result, is started by the launcher `local`
(with 1 worker: without a launcher), by `torchrun`, and by Ray Train on a local cluster. Each round runs all of them, in
a rotating order, so that changes of the machine's speed affect all of them equally. The images/s of a run are the
median over its log windows after the first; ratios are medians over rounds.

Ray's own processes share the cores of the workers, as on a machine without other cores. To show their cost, the largest
number of workers is also run with one core reserved; the workers then share the remaining cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import plots
from report import about, heading, write_json

LAUNCHERS = ("local", "torchrun", "ray")
Case = tuple[str, int, int]
"""Launcher, number of workers, number of cores reserved from them."""


def pinned_digits() -> Any:
    """A data set factory that also pins the worker that calls it to a core."""
    import contextlib
    import os
    from pathlib import Path

    from udddm.data.sources import digits

    cores = sorted(os.sched_getaffinity(0))
    # UDDDM_SPARE_CORE reserves the last core for the other processes of the launcher.
    cores = cores[: len(cores) - int(os.environ.get("UDDDM_SPARE_CORE", "0"))]
    core = cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]
    for thread in Path("/proc/self/task").iterdir():  # later threads inherit the affinity
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})
    return digits()


def one_run(launcher: str, workers: int, run: Path, steps: int, engine: str) -> None:
    """Run in a child process; with torchrun, in every rank."""
    import udddm
    from udddm import config as configuration

    chosen = configuration.load_config(
        "digits",
        [
            "objective={name: chain, huber_c: 1.5}",
            "network={base_channels: 32, channel_mult: [1, 2], blocks_per_level: 1, attention_resolutions: [], "
            "dropout: 0.0, condition: none}",
            f"train.steps={steps}",
            "train.batch_size=128",
            f"checkpoint.every_steps={steps}",
            "sample={every_steps: 0, final: 0}",
            "log_every_steps=20",
            *(["engine.name=deepspeed"] if engine == "deepspeed" else []),
        ],
    )
    udddm.train(
        chosen,
        pinned_digits,
        run_dir=run,
        device="cpu",
        backend="ray" if launcher == "ray" else "auto",
        workers=workers,
    )


def measure(launcher: str, workers: int, spare: int, run: Path, arguments: argparse.Namespace) -> float:
    """Images/s of one run, with `spare` cores reserved from its workers."""
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += [str(Path(__file__).resolve()), "--one-run", launcher, "--workers", str(workers), "--into", str(run)]
    command += ["--steps", str(arguments.steps), "--engine", arguments.engine]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**os.environ, "UDDDM_SPARE_CORE": str(spare)},
    )
    if done.returncode:
        raise SystemExit(f"{launcher} with {workers} workers failed:\n{done.stdout}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates: list[float] = [line["images_per_second"] for line in lines[1:]]
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps per run")
    parser.add_argument("--max-workers", type=int, default=2)
    parser.add_argument("--engine", choices=["torch", "deepspeed"], default="torch")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="output file; a table (.txt) and a plot (.png) are written next to it"
    )
    parser.add_argument("--one-run", choices=LAUNCHERS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_run:
        one_run(arguments.one_run, arguments.workers, arguments.into, arguments.steps, arguments.engine)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    counts = [n for n in (1, 2, 4, 8) if n <= arguments.max_workers]
    plans = [(workers, 0) for workers in counts] + [(counts[-1], 1)]
    cases = [(launcher, *plan) for plan in plans for launcher in LAUNCHERS]
    found: dict[Case, list[float]] = {case: [] for case in cases}
    head = about("ray")
    lines = [
        heading(head),
        f"{'launcher':10}{'workers':>8}{'spare cores':>13}{'images/s':>10}{'of torchrun':>13}{'of 1 worker':>13}",
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for number in range(arguments.rounds):
            turn = number % len(cases)
            for case in cases[turn:] + cases[:turn]:
                rate = measure(*case, Path(name) / f"{case[0]}-{case[1]}-{case[2]}-{number}", arguments)
                found[case].append(rate)
                print(f"round {number}: {case}: {rate:.0f} images/s", file=sys.stderr, flush=True)

    def ratio(case: Case, other: Case) -> float:
        return statistics.median(a / b for a, b in zip(found[case], found[other], strict=True))

    rows = []
    for launcher, workers, spare in cases:
        row = {
            "launcher": launcher,
            "workers": workers,
            "spare_cores": spare,
            "images_per_second": round(statistics.median(found[launcher, workers, spare]), 1),
            "ratio_to_torchrun": round(ratio((launcher, workers, spare), ("torchrun", workers, spare)), 3),
            "ratio_to_one_worker": round(ratio((launcher, workers, spare), (launcher, 1, 0)), 3),
            "rounds": [round(rate, 1) for rate in found[launcher, workers, spare]],
        }
        rows.append(row)
        lines.append(
            f"{launcher:10}{workers:8}{spare:13}{row['images_per_second']:10.0f}{row['ratio_to_torchrun']:13.3f}"
            f"{row['ratio_to_one_worker']:13.3f}"
        )
    print("\n".join(lines))
    if arguments.json is not None:
        write_json(arguments.json, head, {"rows": rows})
        arguments.json.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        plots.scaling(rows, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
