"""Find trained weights in a run, a checkpoint or a release: in a directory, at a URL, or on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from udddm.backends.engines.base import Engine
from udddm.config import RunConfig
from udddm.ema import Average
from udddm.errors import CheckpointError
from udddm.files import load_json
from udddm.runs import hub
from udddm.runs.checkpoint import NAME, corruption, load_config
from udddm.runs.conversion import Converted, convert
from udddm.runs.remote import open_copy
from udddm.runs.run import Run
from udddm.runs.weights import Saved
from udddm.storage import local_path

T = TypeVar("T")
ATTEMPTS = 20
"""Maximum number of checkpoints that are tried while a live run deletes them."""


@contextmanager
def checkpoint_files(where: str | Path, wanted: tuple[str, ...] = ("config", "model", "ema")) -> Iterator[Path]:
    """A local directory with the files of a checkpoint. `where` is a checkpoint, or a run, whose newest valid
    checkpoint is used, or a release on the Hub (`hf://user/model`). From a URL, only files whose names start with one
    of `wanted` are downloaded. Raises CheckpointError, StoreError, ConfigError."""
    if hub.on_hub(where):
        yield hub.snapshot(str(where))
        return
    local = local_path(where)
    if local is not None:
        yield _local_checkpoint(local)
        return
    url, _, last = str(where).rstrip("/").rpartition("/")
    one = NAME.fullmatch(last) is not None
    run = open_copy(
        url.removesuffix("/checkpoints") if one else where,
        wanted=lambda name: name.startswith(wanted),
    )
    checkpoints = run.checkpoints()
    path = checkpoints.directory / last if one else checkpoints.newest_valid()
    if path is None:
        raise CheckpointError(f"{where} holds no checkpoint")
    if one and (problem := checkpoints.corruption(path)):
        raise CheckpointError(f"checkpoint {where} is not valid: {problem}")
    yield path


def read_checkpoint(
    where: str | Path, action: Callable[[Path], T], wanted: tuple[str, ...] = ("config", "model", "ema")
) -> T:
    """`action` of the directory of `checkpoint_files`. Repeated with the next checkpoint if a live run deletes this one
    while it is read. Raises the errors of `action`, CheckpointError, StoreError."""
    for _ in range(ATTEMPTS):
        with checkpoint_files(where, wanted) as path:
            try:
                return action(path)
            except Exception:
                if path.exists():
                    raise
    raise CheckpointError(f"a live run deletes the checkpoints of {where} before they are read: raise checkpoint.keep")


def _local_checkpoint(where: Path) -> Path:
    if not where.exists():
        raise CheckpointError(f"{where} does not exist")
    if (where / "config.json").exists() or (where / "manifest.json").exists():
        if (where / "manifest.json").exists() and (problem := corruption(where)):
            raise CheckpointError(f"checkpoint {where} is not valid: {problem}")
        return where
    newest = Run(where).checkpoints().newest_valid()
    if newest is None:
        raise CheckpointError(f"{where} holds no checkpoint")
    return newest


def recorded_data(where: str | Path) -> dict[str, Any] | None:
    """The fingerprint of the data that a run was started with, given the run or one of its checkpoints; None for a
    release, which has none. Raises StoreError, CheckpointError."""
    found = recorded_run(where)
    return None if found is None else found["dataset"]


def recorded_run(where: str | Path) -> dict[str, Any] | None:
    """The contents of run.json, given a run or one of its checkpoints; None for a release, which has none. Raises
    StoreError, CheckpointError."""
    if hub.on_hub(where):
        return None
    local = local_path(where)
    if local is not None:
        place = local.resolve()
        runs = [place, place.parent.parent] if NAME.fullmatch(place.name) else [place]
    else:
        url, _, last = str(where).rstrip("/").rpartition("/")
        copy = open_copy(url.removesuffix("/checkpoints") if NAME.fullmatch(last) else where, wanted=lambda name: False)
        runs = [copy.path]
    for run in runs:
        if (run / "run.json").exists():
            found: dict[str, Any] = load_json(run / "run.json", "dataset")
            return found
    return None


def begin_from(
    where: str | Path, config: RunConfig, shape: tuple[int, int, int], engine: Engine, emas: Sequence[Average]
) -> str:
    """Initialize a new run's weights and all its EMAs from the first EMA of `where`, or from the weights of another
    project's file (`udddm/runs/conversion/`). Optimizer state is not loaded.

    `config` is the new run's, and `shape` (C, H, W) that of its images. Returns the checkpoint's name. Raises
    CheckpointError, StoreError, ConfigError.
    """

    def fill(weights: Saved | Converted) -> None:
        weights.check_network(engine.shapes)
        engine.load_weights(weights)
        for average in emas:
            for name in engine.shapes:
                engine.fill(average.weights, name, weights[name])

    def load(directory: Path) -> str:
        trained, _ = load_config(directory)
        fill(Saved.average(directory, trained.train.averages, None))
        return directory.resolve().name

    converted = convert(where, config, shape)
    if converted is not None:
        fill(converted)
        return Path(where).name
    return read_checkpoint(where, load)
