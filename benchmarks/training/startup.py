"""The time of `udddm-train --help`, relative to the time in which Python imports pydantic and yaml.

    python benchmarks/training/startup.py --json benchmarks/results/startup.json

Times are those of alternating processes, including startup. The ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

HELP = [sys.executable, "-c", "from udddm.cli.train import main; main(['--help'])"]
IMPORT = [sys.executable, "-c", "import pydantic, yaml"]


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for command in (HELP, IMPORT):  # warm up the file caches
        seconds(command)
    pairs = [(seconds(HELP), seconds(IMPORT)) for _ in range(arguments.rounds)]
    result = {
        "help_seconds": round(statistics.median(a for a, _ in pairs), 4),
        "import_seconds": round(statistics.median(b for _, b in pairs), 4),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
    }
    head = about()
    print(f"{heading(head)}\n{json.dumps(result)}")
    if arguments.json:
        write_json(arguments.json, head, result)


if __name__ == "__main__":
    main()
