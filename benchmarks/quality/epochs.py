"""Tables of runs with one row per epoch: loss, speed, and the scores of `evaluate.every_steps` at the end of the epoch.

    python benchmarks/quality/epochs.py runs/third runs/third-ect runs/third-stored --json FILE

Loss and images/s are medians over the log lines of an epoch. An epoch without scores (the last of a stopped run) is
omitted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, write_json


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def epochs(run: Path) -> list[dict[str, Any]]:
    metrics = lines(run / "metrics.jsonl")
    rows = []
    begin = 0
    for number, scores in enumerate(lines(run / "evaluation.jsonl"), start=1):
        logged = [line for line in metrics if begin < line["step"] <= scores["step"]]
        begin = scores["step"]
        rows.append(
            {"epoch": number, "step": begin}
            | {key: median(line[key] for line in logged) for key in ("loss", "images_per_second")}
            | {"learning_rate": logged[-1]["learning_rate"]}
            | {key: scores[key] for key in ("n", "evaluations", "fd", "precision", "recall")}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {run.name: epochs(run) for run in arguments.runs}
    for name, rows in found.items():
        print(f"{name}\nepoch    loss  images/s      fd  precision  recall")
        for row in rows:
            line = "{epoch:5d}  {loss:6.2f}  {images_per_second:8.1f}  {fd:6.2f}  {precision:9.2f}  {recall:6.2f}"
            print(line.format(**row))
    if arguments.json:
        write_json(arguments.json, about(), {"runs": found})


if __name__ == "__main__":
    main()
