"""What `python benchmarks/quality/study.py report` prints and draws: tables in Markdown, curves over time, grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Books = dict[str, Any]


def report(book: Books, runs: Path, out: Path) -> None:
    rows: dict[tuple[str, ...], Row] = {tuple(key.split(" | ")): row for key, row in book["rows"].items()}
    print(f"{book['data']}, {book['machine']}, {book['date']}\n")
    _speeds(book["speed"])
    for budget in ("time", "images"):
        _objectives({key: row for key, row in rows.items() if key[2] == budget}, budget, book["speed"])
    _ablations({key: row for key, row in rows.items() if key[2] == "ablation"})
    _curves({key: row for key, row in rows.items() if key[2] == "time" and key[3] == "0"}, out, book)
    _grids({key: row for key, row in rows.items() if key[2] == "time" and key[3] == "0"}, runs, out, book["data"])


def _speeds(found: dict[str, Row]) -> None:
    print("| same network, one run | images/s | over iCT | over rounds | whole run |\n|---|---|---|---|---|")
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
    """At the speed that was measured side by side with the others'."""
    return float(images / speed["run_images_per_second"] / 60)


def _objectives(rows: dict[tuple[str, ...], Row], budget: str, speed: dict[str, Row]) -> None:
    if not rows:
        return
    print(f"At equal {budget}; mean and deviation over seeds where there are several\n")
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


def _curves(rows: dict[tuple[str, ...], Row], out: Path, book: Books) -> None:
    if not rows:
        return
    data = book["data"]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = sorted({key[1] for key in rows})
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(7 * len(kinds), 5), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for (name, of, *_), row in rows.items():
            if of == kind:
                label = f"{name} (9 evaluations)" if "Heun" in name else name
                minutes = [_minutes(p["images"], book["speed"][name]) for p in row["curve"]]
                axis.plot(minutes, [p["fd"] for p in row["curve"]], "o-", ms=3, label=label)
        axis.set(title=f"{data}, {kind.upper()}", xlabel="minutes of training, one core", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("fd of the EMA, 1 evaluation")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / f"quality-{data}.png", dpi=100)
    print(f"curves: {out / f'quality-{data}.png'}")


def _grids(rows: dict[tuple[str, ...], Row], runs: Path, out: Path, data: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = {}
    for key in rows:
        directory = runs / "".join(c if c.isalnum() else "-" for c in " | ".join(key))
        found = [p for p in (directory / "samples-35.npy", directory / "samples-1.npy") if p.exists()]
        if found:
            kept[key] = np.load(found[0])
    if not kept:
        return
    columns = 5
    lines = -(-len(kept) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, ((name, kind, *_), images) in zip(axes.flat, kept.items(), strict=False):
        framed = np.pad(images[:36, 0], ((0, 0), (1, 1), (1, 1)))  # grey, between black and white
        side = framed.shape[-1]
        tiled = framed.reshape(6, 6, side, side).transpose(0, 2, 1, 3).reshape(6 * side, 6 * side)
        axis.imshow(tiled, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        evaluations = "35 evaluations" if "Heun" in name else "1 evaluation"
        axis.set_title(f"{name}, {kind.upper()}: {evaluations}", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / f"quality-{data}-grids.png", dpi=80)
    print(f"grids: {out / f'quality-{data}-grids.png'}")
