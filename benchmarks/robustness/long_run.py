"""Memory, file descriptors and threads of a run over many checkpoints.

    python benchmarks/robustness/long_run.py --json benchmarks/results/long-run.json

A run of 3,000 steps writes a checkpoint every 5 and pictures and scores every 50. Its resident memory, open descriptors
and threads are read from /proc all the time. They must not grow: their median over the last tenth of the steps may
exceed that over the second tenth by 3 % for the memory, and by two for the others. Exits 1 unless that holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tiny_runs

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

SETTINGS = (
    "train.batch_size=16",
    "checkpoint.every_steps=5",
    "sample.every_steps=50",
    "evaluate={every_steps: 50, count: 32, features: 'features:flat'}",
)
MEASURES = ("MiB", "descriptors", "threads")


def usage(pid: int) -> tuple[float, int, int]:
    """Resident MiB, open descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return resident / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), len(list(Path(f"/proc/{pid}/task").iterdir()))


def newest_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def watch(store: str, steps: int, directory: Path) -> list[tuple[int, float, int, int]]:
    """(step, MiB, descriptors, threads) several times per second."""
    (directory / "features.py").write_text("def flat(batch):\n    return batch.flatten(1)[:, :8]\n")
    run, log = directory / store, directory / f"{store}.log"
    environment = {"PYTHONPATH": str(directory), "XDG_CACHE_HOME": str(directory / "cache")}
    arguments = tiny_runs.train_arguments(run, *SETTINGS, store=store, steps=steps)
    process = tiny_runs.start("train", arguments, log, environment, directory)
    seen = []
    while process.is_alive():
        try:
            seen.append((newest_step(run / "metrics.jsonl"), *usage(process.pid or 0)))
        except (OSError, StopIteration):  # it has ended
            break
        time.sleep(0.2)
    if tiny_runs.wait(process):
        raise SystemExit(f"the run failed:\n{log.read_text()}")
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", default=["zarr", "pinned"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    tiny_runs.start_fork_server()
    head = about()
    lines = [heading(head), f"{'store':10}{'tenth of the run':18}" + "".join(f"{name:>13}" for name in MEASURES)]
    print("\n".join(lines), flush=True)
    rows: list[dict[str, Any]] = []
    flat = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for store in arguments.stores:
            seen = watch(store, arguments.steps, Path(name))
            tenths = []
            for tenth in range(10):
                part = [each[1:] for each in seen if each[0] * 10 // (arguments.steps + 1) == tenth]
                tenths.append([statistics.median(values) for values in zip(*part, strict=True)])
                lines.append(f"{store:10}{tenth + 1:<18}" + "".join(f"{value:13.1f}" for value in tenths[-1]))
                print(lines[-1], flush=True)
            first, last = tenths[1], tenths[-1]
            flat &= last[0] <= 1.03 * first[0] and all(b <= a + 2 for a, b in zip(first[1:], last[1:], strict=True))
            rows.append({"store": store, "tenths": tenths})
    lines.append("flat" if flat else "GROWING")
    print(lines[-1])
    write_report(arguments.json, head, {"flat": flat, "stores": rows}, lines)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
