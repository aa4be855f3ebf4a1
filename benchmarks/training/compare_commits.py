"""Images/s of this checkout relative to an earlier commit, with each store, in alternating runs.

    python benchmarks/training/compare_commits.py 530531e --json benchmarks/results/compare-530531e.json

The earlier commit is checked out into a temporary git worktree; where there is no git, name a directory with its files.
With `--config`, both train this configuration of the earlier checkout instead of a tiny one. Each round trains the same
configuration with both, in new processes, in alternating order; its rate is the median of the lines of its log but the
first, which has the start. Ratios are medians over rounds, with the range of the middle half.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import ROOT, about, heading, write_report

SETTINGS = (
    "network={width: 16, multipliers: [1, 2], blocks: 1, attention: [], dropout: 0.1, condition: none}",
    "order={lanes: 4, chunk: 32, window: 2}",
    "train={batch_size: 64, learning_rate: 0.001, ema: [0.99]}",
    "checkpoint.every_steps=25",
    "sample={every_steps: 0, final: 0}",
    "log_every_steps=5",
)
"""By the names of the earlier commits, which are still accepted."""
START = """
import pkgutil, sys, tomllib
text = open(sys.argv.pop(1) + "/pyproject.toml", "rb")
module, _, name = tomllib.load(text)["project"]["scripts"]["udddm-train"].partition(":")
sys.exit(pkgutil.resolve_name(f"{module}:{name}")())
"""
"""Runs the command `udddm-train` of a checkout."""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "earlier"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", place, commit], check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", place], check=True)


def rate(source: Path, store: str, options: list[str], directory: Path) -> float:
    """Images/s of a run with the code in `source`."""
    run = Path(tempfile.mkdtemp(dir=directory)) / "run"
    command = [sys.executable, "-c", START, str(source)]
    command += ["--run-dir", str(run), "--store", store, *options]
    places = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"the run with {source} failed:\n{done.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(statistics.median(line["images_per_second"] for line in lines[1:] or lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--stores", nargs="+", default=["gpu", "pinned", "zarr"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--config", metavar="FILE", help="a configuration, relative to the earlier checkout")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more settings of both")
    parser.add_argument(
        "--set-after", action="append", default=[], metavar="KEY=VALUE", help="settings of this checkout alone"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    given = [f"train.steps={arguments.steps}", *arguments.set]
    settings = given if arguments.config else [*SETTINGS, *given]
    head = about()
    lines = [heading(head), f"{'store':8}{'images/s before':>16}{'after':>8}{'ratio':>8}   middle half"]
    print("\n".join(lines), flush=True)
    rows: list[dict[str, Any]] = []
    memory = Path("/dev/shm")
    with (
        checkout(arguments.commit) as earlier,
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name,
    ):
        options = ["--device", arguments.device, *(part for setting in settings for part in ("--set", setting))]
        if arguments.config:
            options += ["--config", str(earlier / arguments.config)]
        for store in arguments.stores:
            before: list[float] = []
            after: list[float] = []
            for number in range(arguments.rounds):
                sides = [(before, earlier), (after, ROOT)]
                for rates, source in sides if number % 2 else reversed(sides):
                    own = [part for setting in arguments.set_after for part in ("--set", setting)]
                    chosen = options + own if source == ROOT else options
                    rates.append(rate(source, store, chosen, Path(name)))
                    side = "after" if source == ROOT else "before"
                    print(
                        f"  {store} round {number + 1}, {side}: {rates[-1]:.0f} images/s", file=sys.stderr, flush=True
                    )
            ratios = [new / old for old, new in zip(before, after, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append({"store": store, "before": before, "after": after, "ratio": middle, "half": [low, high]})
            lines.append(
                f"{store:8}{statistics.median(before):16.0f}{statistics.median(after):8.0f}{middle:8.3f}   "
                f"{low:.3f} to {high:.3f}"
            )
            print(lines[-1], flush=True)
    write_report(arguments.json, head, {"stores": rows}, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
