"""The pictures of benchmarks/results. Each is drawn from the JSON file next to it:

    python benchmarks/plots.py          # redraws all of them but the grids of samples, which need the runs

One color per curve, with its name at its end.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RESULTS = Path(__file__).resolve().parent / "results"
COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b",
    "#e377c2", "#17becf", "#bcbd22", "#000080", "#7f7f7f", "#000000",
)  # fmt: skip
OURS, OTHERS = COLORS[0], "#b0b0b0"
End = tuple[str, float, str]
"""The name of a curve, its last value, its color."""


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path, dpi: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Software": None})


def _name_ends(axis: Any, x: float, ends: Sequence[End], gap: float = 0.05) -> None:
    """Write the name of each curve to the right of its last point, at least `gap` of the axis apart. The limits of the
    axis must be set."""
    low, high = axis.get_ylim()
    scale = (lambda y: math.log(max(y, low))) if axis.get_yscale() == "log" else (lambda y: y)
    places = sorted((((scale(y) - scale(low)) / (scale(high) - scale(low)), text, color) for text, y, color in ends))
    heights = [height for height, *_ in places]
    for _ in range(500):  # push neighbors apart until all are
        heights[0] = max(heights[0], gap / 2)
        for below in range(len(heights) - 1):
            if (short := gap - (heights[below + 1] - heights[below])) > 1e-6:
                heights[below] -= short / 2
                heights[below + 1] += short / 2
    point = axis.transAxes.inverted().transform(axis.transData.transform((x, low)))[0]
    for height, (value, text, color) in zip(heights, places, strict=True):
        axis.annotate(
            text,
            xy=(point, value),
            xytext=(point + 0.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=color,
            fontsize=8,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)},
        )


# Quality.


def curves(book: Mapping[str, Any], path: Path) -> None:
    """fd over training time: seed 0 of each objective at equal time, one panel per noise schedule."""
    data = book["data"]
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key, row in book["rows"].items():
        name, kind, *rest = key.split(" | ")
        if rest == ["time", "0"]:
            speed = book["speed"][name]["run_images_per_second"] * 60
            found.setdefault(kind, {})[name] = [(point["images"] / speed, point["fd"]) for point in row["curve"]]
    color = dict(zip(book["speed"], COLORS, strict=True))
    figure, axes = _figure(7 * len(found), 5.5, len(found))
    every = [fd for lines in found.values() for points in lines.values() for _, fd in points]
    for axis, kind in zip(axes, sorted(found), strict=True):
        lines = found[kind]
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.5, color=color[name])
        last = max(points[-1][0] for points in lines.values())
        axis.set(yscale="log", ylim=(min(every) / 1.2, max(every) * 1.3), xlim=(0, last * 1.75))
        axis.set_xticks([tick for tick in axis.get_xticks() if tick <= last * 1.01])
        axis.set(title=f"{data}, {kind.upper()}", xlabel="minutes of training, one core")
        ticks = [tick for tick in (10, 20, 50, 100, 200, 500, 1000, 2000) if min(every) / 1.2 <= tick]
        axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        ends = [(f"{_shown(name)}  {points[-1][1]:.0f}", points[-1][1], color[name]) for name, points in lines.items()]
        _name_ends(axis, last, ends, 0.045)
    axes[0].set_ylabel("fd of the EMA, 1 evaluation (lower is better)")
    _save(figure, path)


def refined(book: Mapping[str, Any], path: Path) -> None:
    """fd at one evaluation over the images trained on, with and without refined pairs: every seed, and their mean."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for row in book["rows"].values():
        found.setdefault(row["arm"], []).append([(point["images"], point["fd"]) for point in row["curve"]])
    figure, axes = _figure(7, 4.5)
    axis, ends, last = axes[0], [], 0
    for color, (arm, runs) in zip(COLORS, found.items(), strict=False):
        images = [at for at, _ in runs[0]]
        for run in runs:
            axis.plot(images, [fd for _, fd in run], lw=0.7, alpha=0.5, color=color)
        mean = [float(np.mean([run[i][1] for run in runs])) for i in range(len(images))]
        axis.plot(images, mean, "o-", ms=4, lw=2, color=color)
        name = "refined pairs" if "-" in arm else "without"
        ends.append((f"{name}  {mean[-1]:.1f}", mean[-1], color))
        last = images[-1]
    axis.set(yscale="log", xlim=(0, last * 1.3), xlabel="images trained on")
    ticks = [10, 20, 50, 100, 200, 500, 1000]
    axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= last * 1.01])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _name_ends(axis, last, ends)
    axis.set_ylabel("fd of the EMA, 1 evaluation (lower is better)")
    _save(figure, path)


def _shown(name: str) -> str:
    return f"{name}, 9 evaluations" if "Heun" in name else name


Images = npt.NDArray[np.float32]


def grids(panels: Sequence[tuple[str, Images]], path: Path, columns: int = 5) -> None:
    """Panels of 36 gray images [N, 1, H, W] in [-1, 1] with their titles, in the order given."""
    from matplotlib.figure import Figure
    from PIL import Image

    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for axis, (title, images) in zip(figure.axes, panels, strict=False):
        framed = np.pad(images[:36, 0], ((0, 0), (1, 1), (1, 1)))  # gray, between black and white
        side = framed.shape[-1]
        tiled = framed.reshape(6, 6, side, side).transpose(0, 2, 1, 3).reshape(6 * side, 6 * side)
        axis.imshow(tiled, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    Image.open(drawn).convert("L").quantize(64).save(path, optimize=True)  # a fifth of the size in color


def gaussian(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Error over the noise level, one panel per noise schedule."""
    figure, axes = _figure(5.6 * len(results), 3.9, len(results))
    values = [v for result in results.values() for key in ("chain", "bias", "algorithm_1") for v in result.get(key, [])]
    for axis, (kind, result) in zip(axes, results.items(), strict=True):
        level = np.arange(len(result["t"]))
        curves_of = [
            ("chain, trained", "chain", OURS, "-"),
            (f"exact for {level[-1]} levels", "bias", COLORS[4], "--"),
            ("Algorithm 1", "algorithm_1", COLORS[1], "-"),
        ]
        ends = []
        for name, key, color, style in curves_of:
            if key in result:
                axis.semilogy(level, 100 * np.array(result[key]), style, color=color)
                ends.append((name, 100 * result[key][-1], color))
        axis.set(ylim=(70 * min(values), 150 * max(values)), xlim=(0, level[-1] * 1.4))
        axis.set_xticks([tick for tick in axis.get_xticks() if tick <= level[-1]])
        axis.set_title(f"{kind.upper()}: chain, mean error {100 * result['chain_mean']:.1f} %", fontsize=10)
        axis.set_xlabel("noise level k (0: least noise)")
        axis.grid(axis="y", alpha=0.3)
        _name_ends(axis, level[-1], ends, 0.07)
    axes[0].set_ylabel("RMS(f - f*) / standard deviation, %")
    _save(figure, path)


# Store and training.


def store_rates(side_by_side: Mapping[str, Any], path: Path) -> None:
    """Images/s of our stores and of other ways to keep rows, the fastest first."""
    rates = {name: row["rate"] for name, row in side_by_side["stores"].items()}
    names = sorted(rates, key=lambda name: -rates[name])
    figure, (axis,) = _figure(8, 0.8 + 0.3 * len(names))
    ours = {"gpu", "pinned", "zarr", "zarr-s3"}
    drawn = axis.barh(
        names, [rates[name] for name in names], log=True, color=[OURS if n in ours else OTHERS for n in names]
    )
    axis.bar_label(drawn, [f"{rates[name]:,.0f}" for name in names], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("images/s, random rows read and written, no compute (blue: stores of udddm)", fontsize=9)
    _save(figure, path)


def store_scale(record: Mapping[str, Any], path: Path) -> None:
    """Requests per second and prefix over the number of ranks, and the check of the model."""
    figure, (left, right) = _figure(12.5, 4.8, 2)
    scales = sorted({run["ranks"] for run in record["runs"]})
    named: list[tuple[list[Any], str]] = []
    for color, name in zip(COLORS, dict.fromkeys(run["workload"] for run in record["runs"]), strict=False):
        own = [run for run in record["runs"] if run["workload"] == name]
        ranks = [run["ranks"] for run in own]
        left.plot(ranks, [run["peak_puts"] for run in own], "o-", ms=5, color=color)
        left.plot(ranks, [run["peak_gets"] for run in own], "o:", ms=5, color=color, mfc="white")
        named.append((own, color))
    left.set(xscale="log", yscale="log", xlim=(scales[0] / 1.2, scales[-1] * 6.5), xlabel="ranks")
    left.set_xticks(scales, [str(each) for each in scales])
    left.minorticks_off()
    left.set_ylim(*left.get_ylim())
    for limit, text in ((record["service"]["puts"], "puts"), (record["service"]["gets"], "gets")):
        left.axhline(limit, color="grey", ls="--", lw=1, zorder=0)
        left.text(scales[0] / 1.15, limit * 1.04, f"S3's limit: {limit:.0f} {text}/s", color="grey", fontsize=7)
    left.set_ylabel("most requests to one prefix in one second")
    left.set_title("solid: puts and deletions; dotted: gets and listings", fontsize=9)
    for last in sorted({own[-1]["ranks"] for own, _ in named}):
        _name_ends(left, last, [_waits(own, color) for own, color in named if own[-1]["ranks"] == last], 0.1)
    _validation(right, record["validation"])
    _save(figure, path)


def _waits(own: Sequence[Mapping[str, Any]], color: str) -> End:
    waits = [run["ranks"] for run in own if run["failure"] or run["wait"] > 0.01]
    found = f"waits above 1 % from {waits[0]} ranks on" if waits else "no wait above 1 %"
    return f"{own[-1]['workload']}:\n{found}", own[-1]["peak_puts"], color


def _validation(axis: Any, checks: Sequence[Mapping[str, Any]]) -> None:
    cases = list(dict.fromkeys(check["case"] for check in checks))
    axis.set(xlabel="measured ms per step (real threads, real time)", ylabel="simulated ms per step")
    axis.set_title("the model against real runs: 1 to 4 ranks, 40 ms per step without waits", fontsize=9)
    if not checks:
        return
    steps = [1e3 * check[key] for check in checks for key in ("measured_step", "simulated_step")]
    ends = np.array([0.95 * min(steps), 1.08 * max(steps)])
    axis.plot(ends, ends, color="grey", lw=1)
    axis.fill_between(ends, 0.9 * ends, 1.1 * ends, color="grey", alpha=0.15)
    axis.text(ends[1] * 0.93, ends[1] * 0.955, "within 10 %", color="grey", fontsize=8, ha="right", rotation=33)
    axis.set(xlim=ends, ylim=ends)
    for color, case in zip(COLORS, cases, strict=False):
        own = [
            (1e3 * check["measured_step"], 1e3 * check["simulated_step"]) for check in checks if check["case"] == case
        ]
        axis.plot(*zip(*own, strict=True), "o", color=color)
        if own[-1][0] > 45:  # the others are where nothing waits, and would hide each other's names
            axis.annotate(case, own[-1], xytext=(6, -12), textcoords="offset points", color=color, fontsize=8)
    close = [case for case in cases if all(1e3 * c["measured_step"] <= 45 for c in checks if c["case"] == case)]
    axis.annotate(
        ", ".join(close), (min(steps), max(1e3 * c["simulated_step"] for c in checks if c["case"] in close)),
        xytext=(0, 8), textcoords="offset points", fontsize=8, color="#404040",
    )  # fmt: skip


def scaling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Images/s by launcher, each worker on its own core."""
    figure, (axis,) = _figure(6, 4)
    own = [row for row in rows if not row["spare_cores"]]
    names = list(dict.fromkeys(row["launcher"] for row in own))
    workers = sorted({row["workers"] for row in own})
    ends: list[End] = []
    for color, name in zip(COLORS, names, strict=False):
        rates = [row["images_per_second"] for row in own if row["launcher"] == name]
        axis.plot(workers, rates, "o-", color=color)
        ends.append((f"{name}  {rates[-1]:,.0f}", rates[-1], color))
    best = max(row["images_per_second"] for row in own if row["workers"] == workers[0]) / workers[0]
    axis.plot(workers, [best * each for each in workers], ":", color="grey")
    ends.append(("proportional", best * workers[-1], "grey"))
    span = workers[-1] - workers[0] or 1
    axis.set(ylim=(0, best * workers[-1] * 1.05), xlim=(workers[0] - 0.1 * span, workers[-1] + 0.45 * span))
    axis.set(xlabel="workers, each on its own core", ylabel="images/s", xticks=workers)
    axis.set_title("digits preset, global batch of 128", fontsize=10)
    _name_ends(axis, workers[-1], ends, 0.06)
    _save(figure, path, 120)


def main() -> None:
    def load(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())

    for data in ("digits", "fashion-mnist"):
        curves(load(f"quality-{data}"), RESULTS / f"quality-{data}.png")
    refined(load("refined-digits"), RESULTS / "refined-digits.png")
    gaussian(load("gaussian")["results"], RESULTS / "gaussian.png")
    store_rates(load("store-rivals")["side_by_side"], RESULTS / "store-rivals.png")
    store_scale(load("store_scale"), RESULTS / "store_scale.png")
    scaling(load("scaling")["rows"], RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
