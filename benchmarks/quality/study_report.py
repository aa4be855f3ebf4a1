"""The output of `python benchmarks/quality/study.py report`: tables in Markdown, curves over time, and grids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import udddm
from udddm.data import ImageDataset, load_dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
import plots

Row = dict[str, Any]
Books = dict[str, Any]


def report(book: Books, runs: Path, out: Path) -> None:
    rows: dict[tuple[str, ...], Row] = {tuple(key.split(" | ")): row for key, row in book["rows"].items()}
    print(f"{book['data']}, {book['machine']}, {book['date']}\n")
    _speeds(book["speed"])
    for budget in ("time", "images"):
        _objectives({key: row for key, row in rows.items() if key[2] == budget}, budget, book["speed"])
    _ablations({key: row for key, row in rows.items() if key[2] == "ablation"})
    plots.curves(book, out / f"quality-{book['data']}.png")
    _grids({key: row for key, row in rows.items() if key[1:] == ("ve", "time", "0")}, runs, out, book["data"])


def _speeds(found: dict[str, Row]) -> None:
    print("| same network, one run | images/s | over iCT | over rounds | entire run |\n|---|---|---|---|---|")
    for name, row in found.items():
        low, high = row["over_ict_range"]
        ratios = f"{row['over_ict']:.2f} | {low:.2f} to {high:.2f} | {row['run_over_ict']:.2f}"
        print(f"| {name} | {row['images_per_second']:.0f} | {ratios} |")
    print()


def _spread(values: list[float], digits: int = 1) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def _minutes(images: int, speed: Row) -> float:
    """Minutes of a run at the speed from the interleaved measurement."""
    return float(images / speed["run_images_per_second"] / 60)


def _objectives(rows: dict[tuple[str, ...], Row], budget: str, speed: dict[str, Row]) -> None:
    if not rows:
        return
    print(f"At equal {budget}; mean and standard deviation over several seeds\n")
    print("| | schedule | seeds | steps | minutes | fd, 1 | fd, 2 | fd, 4 | precision | recall | collapsed |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str], list[Row]] = {}
    for (name, kind, _, _), row in rows.items():
        groups.setdefault((kind, name), []).append(row)
    place = {name: number for number, name in enumerate(speed)}
    for (kind, name), found in sorted(groups.items(), key=lambda item: (item[0][0], place[item[0][1]])):
        counts = list(found[0]["evaluations"])
        fds = [
            _spread([row["evaluations"][n]["fd"] for row in found]) + (f" ({n})" if n not in "124" else "")
            for n in counts
        ]
        one = counts[0] if counts[-1] != "35" else "35"
        collapsed = sum(row["evaluations"][one]["collapsed"] for row in found)
        quality = [_spread([row["evaluations"][one][key] for row in found], 2) for key in ("precision", "recall")]
        minutes = f"{_minutes(found[0]['images'], speed[name]):.1f}"
        cells = [name, kind, str(len(found)), str(found[0]["steps"]), minutes, *fds, *quality]
        print(f"| {' | '.join(cells)} | {collapsed} of {len(found)} |")
    print()


def _ablations(rows: dict[tuple[str, ...], Row]) -> None:
    if not rows:
        return
    print("| setting | schedule | fd, 1 | fd, 2 | fd, 4 | recall, 1 | collapsed |\n|---|---|---|---|---|---|---|")
    settings = [name.split(" = ")[0] for name, *_ in rows]
    for (name, kind, *_), row in sorted(rows.items(), key=lambda item: settings.index(item[0][0].split(" = ")[0])):
        scores = row["evaluations"]
        fds = " | ".join(f"{score['fd']:.1f}" for score in scores.values())
        one = scores["1"]
        print(f"| {name} | {kind} | {fds} | {one['recall']:.2f} | {'yes' if one['collapsed'] else 'no'} |")
    print()


def _grids(rows: dict[tuple[str, ...], Row], runs: Path, out: Path, data: str) -> None:
    """Samples of each objective from the same seeds, the best objective first, after real images."""
    panels = []
    for key, row in rows.items():
        directory = runs / "".join(c if c.isalnum() else "-" for c in " | ".join(key))
        for count in ("35", "1"):
            if count in row["evaluations"] and (found := directory / f"samples-{count}.npy").exists():
                evaluations = f", {count} evaluations" if count != "1" else ""
                fd = row["evaluations"][count]["fd"]
                panels.append((fd, f"{key[0]}{evaluations}\nfd {fd:.1f}", np.load(found)))
                break
    if not panels:
        return
    real = ImageDataset(load_dataset(udddm.load_config(data).data))
    images = real.batch(np.arange(36))[0].numpy()
    path = out / f"quality-{data}-grids.png"
    plots.grids(
        [("real images\n", images), *((title, made) for _, title, made in sorted(panels, key=lambda p: p[0]))], path
    )
    print(f"grids: {path}")
