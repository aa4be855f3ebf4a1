"""What a report shows of a run, as plain values: what it recorded, and pictures that its newest checkpoint draws."""

from __future__ import annotations

import base64
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import udddm
from udddm import image_grid, objectives, rng
from udddm.config import RunConfig, as_yaml, resolve
from udddm.config.plugins import OBJECTIVES, SCHEDULES
from udddm.diffusion import schedule
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients
from udddm.errors import ConfigError, UdddmError
from udddm.files import load_json
from udddm.log import log
from udddm.order import Order
from udddm.rng import Stream
from udddm.runs.conditions import Examples
from udddm.runs.model import Model, load_model
from udddm.runs.own import training_data
from udddm.runs.remote import open_copy
from udddm.runs.run import BESIDE, PICTURES, Run
from udddm.tools import inspect
from udddm.tools.report import conditional

CURVES = (
    "step",
    "images",
    "loss",
    "images_per_second",
    "learning_rate",
    "gradient_norm",
    "store_wait_fraction",
    "data_wait_fraction",
    "refined_fraction",
)
"""The metrics of which the page has curves."""
BANDS = 8
"""The most bands of the noise level of which the page has curves."""
POINTS = 500
"""Points of a curve. A longer one shows means."""
FRAMES = 24
"""Pictures of the film of training."""
FILM_BYTES = 12 << 20
SEEDS = 64
LEVELS = 14
SAMPLES = 8
"""Images of which the estimates at every noise level, and the x0-states, are shown."""
BUDGET = 30.0
"""Seconds of drawing samples, after which no further number of evaluations is begun."""


def collect(run: str | Path, *, images: bool = True, device: str = "auto", trust: bool = False) -> dict[str, Any]:
    """The values of a run in a directory or at a URL. See `udddm.tools.report.write` for arguments and errors."""
    opened = open_copy(run)
    found = recorded(run, opened)
    dataset, order = found.pop("dataset"), found.pop("order")
    found |= {
        "written": f"{time.strftime('%Y-%m-%d %H:%M')} by udddm {udddm.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "film": _film(opened.pictures(), order),
        "beside": _beside(opened.path / PICTURES),
        "state": _states(opened, dataset),
        "grids": [],
        "strips": [],
        "levels": None,
        "notes": [],
    }
    if images:
        try:
            model = load_model(run, device=device, trust=trust)
            if model.conditions is None:
                found["grids"], found["levels"] = _grids(model), _levels(model)
            else:
                given = conditional.chosen(model, training_data(run, model.config, trust=trust))
                drawn = conditional.strips(model, given)
                found["strips"] = [{"label": each["label"], "src": _source(each["png"])} for each in drawn]
                found["levels"] = _levels(model, given.first(SAMPLES))
        except UdddmError as error:  # no checkpoint yet, or a network of someone else: the rest is worth a page
            found["notes"].append(f"No samples: {error}")
            log.warning(f"{run}: no samples in the report: {error}")
    return found


def recorded(run: str | Path, opened: Run) -> dict[str, Any]:
    """The values that the `opened` run at `run` has written down, without its images: name, status, facts, metrics,
    scores, configuration; the fingerprint of its data set, and its order. Raises ConfigError, CheckpointError."""
    file = opened.path / "run.json"
    if not file.exists():
        raise ConfigError(f"{run} is not a run: it has no run.json")
    found = load_json(file, "config", "dataset")
    config = resolve(found["config"], str(file))
    rows, scores = list(_lines(opened.path / "metrics.jsonl")), list(_lines(opened.path / "evaluation.jsonl"))
    result = load_json(opened.path / "result.json") if (opened.path / "result.json").exists() else None
    order = _order(config, found["dataset"])
    return {
        "name": str(run).rstrip("/").rpartition("/")[2] or str(run),
        "status": _status(config, order, rows, result),
        "facts": _facts(config, order, found["dataset"]["shape"], rows, scores, result),
        "metrics": _columns(rows),
        "resumed": _resumed(rows),
        "phases": _phases(config, order),
        "scores": [_scored(row, order) for row in scores],
        "config": as_yaml(config.model_dump(mode="json"), flow=False),
        "dataset": found["dataset"],
        "order": order,
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file of JSON lines, which may still be written."""
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and "step" in value:
                    yield value


def _order(config: RunConfig, dataset: dict[str, Any]) -> Order:
    shape = tuple(dataset["shape"])
    return Order.build(config.order, config.seed, int(dataset["length"]), config.train.batch_size, shape)


def _total_steps(config: RunConfig, order: Order) -> int:
    return config.train.steps or max(1, round((config.train.epochs or 0) * order.steps_per_epoch))


def _images_at(step: float, order: Order) -> float:
    """Images seen after a step."""
    return step * order.samples / order.steps_per_epoch


def _status(config: RunConfig, order: Order, rows: list[dict[str, Any]], result: dict[str, Any] | None) -> str:
    total = _total_steps(config, order)
    if result is not None:
        return f"finished: {result['steps']:,} steps"
    if rows:
        return f"step {rows[-1]['step']:,} of {total:,}"
    return "not trained yet"


def _facts(
    config: RunConfig,
    order: Order,
    shape: list[int],
    rows: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    result: dict[str, Any] | None,
) -> list[tuple[str, str]]:
    facts = [("data", f"{config.data.name}: {order.samples:,} images of {'x'.join(map(str, shape))}")]
    facts.append(("objective", config.objective.name))
    if rows:
        last = rows[-1]
        facts.append(("images seen", f"{_images_at(last['step'], order) / 1000:,.4g} thousand"))
        facts += [("loss", f"{last['loss']:.4g}")] if _finite(last.get("loss")) else []
    for name in ("fid", "fd"):
        values = [row[name] for row in scores if _finite(row.get(name))]
        if values:
            facts.append((f"{name}, last and best", f"{values[-1]:.4g}, {min(values):.4g}"))
    rates = [row["images_per_second"] for row in rows if _finite(row.get("images_per_second"))]
    if rates:
        facts.append(("images/s, median", f"{float(np.median(rates)):,.0f}"))
    if result is not None:
        facts.append(("store wait", f"{result['store_wait_fraction']:.2%}"))
        facts.append(("peak host memory", f"{result['peak_host_memory_bytes'] / 1e6:,.0f} MB"))
    return facts


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The curves of the page, with at most POINTS points each: means of neighbors."""
    size = max(1, math.ceil(len(rows) / POINTS))
    found: dict[str, list[float | None]] = {}
    bands = dict.fromkeys(name for row in rows for name in row if name.startswith("loss_sigma_"))
    for name in [*CURVES, *list(bands)[:BANDS]]:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, (int, float)) for value in values):
            found[name] = [
                _mean(values[i : i + size], last=name in ("step", "images")) for i in range(0, len(rows), size)
            ]
    return found


def _mean(values: list[Any], last: bool) -> float | None:
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if not numbers:
        return None
    return numbers[-1] if last else float(f"{sum(numbers) / len(numbers):.6g}")


def _resumed(rows: list[dict[str, Any]]) -> list[float]:
    """Images seen at which the run was resumed: where the time since the start of the process drops."""
    found = []
    for before, after in itertools.pairwise(rows):
        if after.get("elapsed_seconds", math.inf) < before.get("elapsed_seconds", 0):
            found.append(float(before.get("images", 0)))
    return found


def _phases(config: RunConfig, order: Order) -> list[dict[str, Any]]:
    """Where the phases of the objective begin. None for a custom objective or schedule, which is not imported."""
    if OBJECTIVES.is_import(config.objective.name) or SCHEDULES.is_import(config.schedule.kind):
        return []
    total = _total_steps(config, order)
    epochs = total / order.steps_per_epoch
    objective = objectives.build(config, schedule.build(config.schedule), epochs, (1, 1, 1))
    found: list[dict[str, Any]] = []
    for epoch in range(math.ceil(epochs)):
        text = objective.phase(epoch)
        if not found or found[-1]["text"] != text:
            found.append({"images": epoch * order.samples, "text": text})
    return found


def _scored(row: dict[str, Any], order: Order) -> dict[str, Any]:
    kept = {name: row[name] for name in ("fid", "fd", "kid", "recall", "precision") if _finite(row.get(name))}
    return {"images": _images_at(row["step"], order), "evaluations": row.get("evaluations", 1), **kept}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _source(data: bytes) -> str:
    """A data URI of a PNG file."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _picture(images: torch.Tensor, columns: int | None = None, side: int = 56) -> str:
    return _source(image_grid.png(images, columns=columns, side=side))


def _film(directory: Path, order: Order) -> list[dict[str, Any]]:
    """The grids that the run wrote while training: the same seeds at every step."""
    files = sorted(directory.glob("step-*.png")) if directory.is_dir() else []
    if len(files) > FRAMES:
        files = [files[round(i * (len(files) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    while sum(file.stat().st_size for file in files) > FILM_BYTES and len(files) > 2:
        files = files[::2]
    found = []
    for file in files:
        with suppress(OSError, ValueError):
            step = int(file.stem.partition("-")[2])
            found.append({"step": step, "images": _images_at(step, order), "src": _source(file.read_bytes())})
    return found


def _beside(directory: Path) -> list[dict[str, str]]:
    """The grids that belong to those of the film, of a run with `data.condition`."""
    labels = zip(BESIDE, (conditional.CONDITION, conditional.REAL), strict=True)
    return [
        {"label": label, "src": _source((directory / name).read_bytes())}
        for name, label in labels
        if (directory / name).is_file()
    ]


def _states(run: Run, dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """The stored estimates of some samples, oldest first. Empty if the run keeps no state, or none can be read."""
    samples = np.unique(np.linspace(0, int(dataset["length"]) - 1, SAMPLES).astype(np.int64))
    frames: dict[str, list[torch.Tensor]] = {}
    try:
        place = inspect.of_run(str(run), run)
        for sample in samples:
            for name, estimate in inspect.estimates(place, int(sample)):
                frames.setdefault(name, []).append(estimate)
    except UdddmError:
        return []
    whole = [(name, rows) for name, rows in frames.items() if len(rows) == len(samples)]
    if len(whole) > FRAMES:
        whole = [whole[round(i * (len(whole) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    return [{"name": _in_words(name), "src": _picture(torch.stack(rows), columns=len(samples))} for name, rows in whole]


def _in_words(name: str) -> str:
    """gen-000012 -> generation 12; step-00000100 -> checkpoint of step 100."""
    kind, _, number = name.partition("-")
    words = {"gen": "generation", "step": "checkpoint of step"}
    return f"{words[kind]} {int(number)}" if kind in words and number.isdigit() else name


def grid_size(model: Model) -> tuple[int, int]:
    """(images, columns) of a grid of samples: a class per column if there are 2 to 20, otherwise 8 x 8."""
    classes = model.config.network.classes
    columns = classes if 2 <= classes <= 20 else 8
    return SEEDS if columns == 8 else columns * max(1, min(8, 96 // columns)), columns


def _grids(model: Model) -> list[dict[str, Any]]:
    """Samples of the same seeds with 1, 2 and 4 evaluations; a class per column."""
    count, columns = grid_size(model)
    found: list[dict[str, Any]] = []
    began = time.monotonic()
    for evaluations in (1, 2, 4):
        spent = time.monotonic() - began
        if found and spent * 3 > BUDGET:  # the next one takes about twice as long as all so far
            break
        images = torch.from_numpy(model.sample(range(count), steps=evaluations))
        found.append({"evaluations": evaluations, "src": _picture(images, columns=columns)})
    return found


@torch.no_grad()
def _levels(model: Model, examples: Examples | None = None) -> dict[str, Any]:
    """What one evaluation says of noised images, from low to high noise.

    The images are samples of the model itself, for `examples` if it is conditioned on images of its data set.
    """
    seeds = list(range(SAMPLES)) if examples is None else examples.seeds
    device, count = model.device, len(seeds)
    if examples is None:
        drawn = torch.from_numpy(model.sample(seeds, steps=2))
    else:
        drawn = conditional.sampled(model, examples, 2)
    images = drawn.to(device)
    keys = [rng.as_tensor(rng.keys(1, stream, np.array(seeds))) for stream in (Stream.NOISE, Stream.SAMPLE_CONDITION)]
    noise, condition = (rng.normal(key.to(device), model.shape) for key in keys)
    if examples is not None and model.conditions is not None:
        condition = model.conditions.prepared(examples.given).to(device)
    given = model.default_labels(seeds) if examples is None or examples.labels is None else examples.labels
    given = given if model.config.network.classes else None
    labels = None if given is None else torch.tensor(given, device=device)
    sigmas = np.geomspace(model.schedule.lowest, model.schedule.highest, LEVELS)
    conditioned = condition if model.config.network.conditioned else None
    frames = []
    for t, sigma in zip(model.schedule.time(sigmas), sigmas, strict=True):
        at = Coefficients(*torch.from_numpy(model.schedule.coefficients(np.full(count, t))).to(device))
        noisy = add_noise(images, noise, at)
        estimate = denoise(model.network, noisy, at, conditioned, labels)
        scale = torch.hypot(at.alpha, at.sigma)[:, None, None, None]
        shown = torch.cat([noisy / scale, estimate]).cpu()
        frames.append({"sigma": float(f"{sigma:.3g}"), "src": _picture(shown, columns=count)})
    return {"images": _picture(images.cpu(), columns=count), "frames": frames}
