"""A run directory: whose it is, that nobody else is writing to it, and whether it is finished."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig, StoreConfig, as_yaml, resolve
from udddm.data import ImageDataset, check_unchanged
from udddm.errors import ConfigError
from udddm.files import load_json, make_directory, write_json, write_text
from udddm.runs.checkpoint import Checkpoints
from udddm.storage.guard import Guard
from udddm.store.base import StoreContext
from udddm.store.layout import StateLayout

OWN_FILES = ("config.yaml", "metrics.jsonl", "evaluation.jsonl", "result.json", "samples.npy", "samples.png")
"""What a run writes at the top of its directory besides run.json."""
AVERAGES = "ema"
"""Where in a run the averages of the weights are put down (udddm/runs/posthoc_ema.py)."""


class Run:
    """A run directory. `udddm.runs.remote.RemoteRun` is one that is at a URL."""

    def __init__(self, path: Path):
        self.path = path
        """A directory of this machine; what is written there is the run, or is on its way to the run's URL."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def state(self) -> str | Path:
        """Where a zarr store goes that has no URL of its own."""
        return self.path / "state"

    @property
    def identity(self) -> str:
        """The same wherever it is seen from."""
        return str(self.path.resolve())

    def store_context(self, layout: StateLayout, config: StoreConfig) -> StoreContext:
        """What this run's x0-state store is created from."""
        return StoreContext(layout, config, self.state, self.identity, run_id(self.path), self.guard)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path)

    def averages(self) -> Path:
        """A directory of this machine with what the run holds under AVERAGES. Raises StoreError."""
        return self.path / AVERAGES

    @contextmanager
    def lock(self, patience: float | None = None) -> Iterator[None]:
        """Keep every other process from writing to it. Raises ConfigError or StoreError when one is.

        `patience`: the seconds to wait for another to end, where that can be waited for; None: as a start does.
        """
        with locked(self.path):
            yield

    @property
    def guard(self) -> Guard:
        """Asked before anything of it is changed, once it is held, or shared by the rank that holds it."""
        return Guard()

    def download(self) -> None:
        """Begin with what the run holds and nothing else, once it is held. Raises StoreError."""

    def check_visible(self, ranks: Ranks) -> None:
        """On every rank, once the first holds the run: see it from here. Raises ConfigError, StoreError."""
        ranks.check_shared(self.path, "the run directory")

    def leave(self) -> None:
        """On every rank, in the end: what `share` began is over."""

    def upload(self) -> None:
        """Put what was written to `path` where the run is. Raises StoreError."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make the directory and hold it. Raises ConfigError when it cannot be written or another process holds it."""
    try:
        make_directory(run_dir)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        problem = f"cannot write to the run directory {run_dir}: {error}; choose another with --run-dir"
        raise ConfigError(problem) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        problem = f"another process is training in {run_dir}; wait for it or choose another --run-dir"
        raise ConfigError(problem) from None
    try:
        yield
    finally:
        os.close(descriptor)


def run_id(run_dir: Path) -> str:
    """What tells a run from all others, wherever its directory is moved; "" for one that has no `run.json`."""
    path = run_dir / "run.json"
    return str(load_json(path, "config").get("id", "")) if path.exists() else ""


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The leaves in which two configurations differ, as `key: old -> new`."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def check_or_record(run_dir: Path, config: RunConfig, dataset: ImageDataset) -> None:
    """Record what the run is, or check that it is still the same.

    Raises ConfigError when the directory belongs to another configuration, DataError when the data set changed.
    """
    path = run_dir / "run.json"
    resolved = config.model_dump(mode="json")
    if path.exists():
        recorded = load_json(path, "config", "dataset")
        begun = resolve(recorded["config"], str(path))  # a version that lacked a setting did as its default does
        if begun.fingerprint() != config.fingerprint():
            decisive = [
                line
                for line in differences(recorded["config"], resolved)
                if line.split(":")[0] not in RunConfig.changeable() and line.split(".")[0] not in RunConfig.changeable()
            ]
            raise ConfigError(
                f"{run_dir} belongs to a run of another configuration ({'; '.join(decisive)}); "
                "use that configuration to resume it, or another --run-dir"
            )
        current = dataset.fingerprint()
        if config.network.classes:  # a run that learned other labels cannot go on with these
            current.pop("earlier_digest", None)
        check_unchanged(recorded["dataset"], current)
        if not (run_dir / "config.yaml").exists():  # the first start was killed between the two files
            write_text(run_dir / "config.yaml", as_yaml(resolved, flow=False))
        return
    if (run_dir / "checkpoints").exists():
        raise ConfigError(f"{run_dir} holds checkpoints but no run.json; restore that file or choose another --run-dir")
    if mine := [name for name in OWN_FILES if (run_dir / name).exists()]:
        raise ConfigError(
            f"{run_dir} holds {', '.join(mine)} but no run.json, so they are not this run's and would be written over: "
            "choose an empty directory with --run-dir, or move them away"
        )
    write_json(
        path,
        {
            "id": uuid.uuid4().hex,
            "config": resolved,
            "dataset": dataset.fingerprint(),
        },
    )
    # After run.json, which identifies the directory as a run.
    write_text(run_dir / "config.yaml", as_yaml(resolved, flow=False))
