"""`udddm export`: a trained model in the formats of other programs, each a folder that is complete or absent."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from udddm.errors import ConfigError, UdddmError
from udddm.files import expanded, make_directory, sync_directory, sync_file
from udddm.runs.conditions import Examples
from udddm.runs.model import Model, load_model
from udddm.runs.own import training_data
from udddm.tools.export.facts import Facts, facts_of
from udddm.tools.report import conditional

FORMATS = {
    "safetensors": "udddm.tools.export.release:write",
    "onnx": "udddm.tools.export.onnx_model:write",
    "diffusers": "udddm.tools.export.diffusers_folder:write",
    "hub": "udddm.tools.export.release:write",
    "web": "udddm.tools.export.web:write",
}
"""The writer of each format, called as `write(source, directory, options)`. It returns lines to print."""


@dataclass(frozen=True)
class Options:
    """What is exported, and how."""

    ema: float | str | None = None
    """The average of the weights, as in `load_model`."""
    ema_length: float | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    """Of the ONNX file."""
    runtime: Path | None = None
    """The folder of the npm package onnxruntime-web, for a page that needs no other server."""
    trust: bool = False
    """Allow the configuration to import code, as `load_model` does."""
    data: bool = True
    """Whether examples of the data set are shown, of a model with `data.condition`."""


@dataclass(frozen=True)
class Source:
    """The model that is exported, on the CPU."""

    model: Model
    average: str
    """The name of the average of the weights: a decay, power-<length>, or none for the raw weights."""
    facts: Facts
    examples: Examples | None = None
    """Of a model with `data.condition`, if its data set is at hand."""


def write(run: str | Path, out: str | Path, to: str, options: Options | None = None) -> list[str]:
    """Export a run, a checkpoint or a release to the new or empty folder `out`. Returns lines about what was written.

    `run` is a path, a URL, or hf://user/model; `to` is a key of `FORMATS`. The folder appears once it is complete.

    Raises ConfigError (an unknown format, a folder with other files, a missing package, a model that the format cannot
    hold), CheckpointError, StoreError, and OSError.
    """
    chosen = options or Options()
    if to not in FORMATS:
        raise ConfigError(f"there is no format {to!r}; the formats are {', '.join(FORMATS)}")
    place = expanded(out).absolute()
    check_free(place)
    module, _, function = FORMATS[to].partition(":")
    writer: Callable[[Source, Path, Options], list[str]] = getattr(importlib.import_module(module), function)
    model = load_model(run, ema=chosen.ema, ema_length=chosen.ema_length, device="cpu", trust=chosen.trust)
    if model.conditions is None and not chosen.data:
        raise ConfigError(
            f"--no-data has no effect: {run} is not conditioned on images, and shows none of its data set"
        )
    examples, notes = (None, []) if to == "onnx" else _examples(run, model, chosen)
    source = Source(model, _average(model, chosen), facts_of(run), examples)
    with _new_folder(place) as folder:
        return [*writer(source, folder, chosen), *notes]


def _examples(run: str | Path, model: Model, options: Options) -> tuple[Examples | None, list[str]]:
    """Samples of the data set of a model with `data.condition`, and lines about what an export then shows."""
    if model.conditions is None or not options.data:
        return None, []
    try:
        found = conditional.chosen(model, training_data(run, model.config, trust=options.trust))
    except UdddmError as error:
        return None, [f"without examples of conditioning images, because the data set is not at hand: {error}"]
    return found, [f"contains {len(found.seeds)} images of the data set as examples; --no-data leaves them out"]


def _average(model: Model, options: Options) -> str:
    """The name of the average that `load_model` has chosen."""
    if options.ema_length is not None:
        return f"power-{options.ema_length:g}"
    known = [*model.config.train.averages, "none"]
    if options.ema is None:
        return known[0]
    return str(options.ema) if str(options.ema) in known else f"{float(options.ema):g}"


def check_free(out: Path) -> None:
    """Raise ConfigError unless `out` does not exist or is an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "has files" if out.is_dir() else "is a file"
        raise ConfigError(f"--out {out} {what}; name a new folder, or delete it first")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end. It is deleted after an error, with the parents made for it."""
    out = out.resolve()
    missing = [parent for parent in out.parents if not parent.exists()]
    make_directory(out.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial.chmod(0o755)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                sync_file(path)
            else:
                sync_directory(path)
        sync_directory(partial)
        partial.rename(out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # it has the finished folder, or somebody else's files
                parent.rmdir()
