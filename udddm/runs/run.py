"""A run directory: identity, exclusive locking, and completion."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from udddm.backends.distributed.ranks import Ranks
from udddm.config import OrderConfig, RunConfig, StoreConfig, as_yaml, resolve
from udddm.data import ImageDataset, check_unchanged
from udddm.errors import ConfigError, DataError
from udddm.files import load_json, lock_file, make_directory, sync_directory, sync_file, write_json, write_text
from udddm.log import Dispensable, log
from udddm.runs.checkpoint import Checkpoints
from udddm.storage.guard import Guard
from udddm.store.base import StoreContext
from udddm.store.layout import StateLayout

OWN_FILES = ("config.yaml", "metrics.jsonl", "evaluation.jsonl", "result.json", "samples.npy", "samples.png")
"""What a run writes at the top of its directory besides run.json."""
APPENDED = ("metrics.jsonl", "tensorboard/*")
"""Files of a run that grow during training."""
PICTURES = "samples"
"""Subdirectory of a run for grids of samples, `step-*.png`."""
BESIDE = ("condition.png", "real.png")
"""In the same subdirectory, of a run with `data.condition`: the conditioning images of these samples, and the images of
the data set that they belong to."""
AVERAGES = "ema"
"""Subdirectory of a run for the saved EMAs of the weights (udddm/runs/posthoc_ema.py)."""


class Run:
    """A run in a local directory. `udddm.runs.remote.RemoteRun` is a run at a URL."""

    def __init__(self, path: Path):
        self.path = path
        """A local directory. It is the run itself, or holds files to be uploaded to the run's URL."""
        self.exclusive = True
        """Whether `lock` keeps out other processes. False in a directory whose file system has no locks."""
        self._metrics = Dispensable("the metrics to disk")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def state(self) -> str | Path:
        """Location of a zarr store without a separate URL."""
        return self.path / "state"

    @property
    def identity(self) -> str:
        """A name of the run's location that is the same on all machines."""
        return str(self.path.resolve())

    def store_context(self, layout: StateLayout, config: StoreConfig) -> StoreContext:
        """The context from which this run's x0-state store is created."""
        return StoreContext(layout, config, self.state, self.identity, run_id(self.path), self.guard)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path)

    def averages(self) -> Path:
        """A local directory with the run's saved EMAs (`AVERAGES`). Raises StoreError."""
        return self.path / AVERAGES

    def pictures(self) -> Path:
        """A local directory with the grids of samples that the run drew during training; it may not exist. Raises
        StoreError."""
        return self.path / PICTURES

    def trained(self) -> bool:
        """Whether the run has a checkpoint or saved EMAs, which a start with another configuration would lose."""
        kept = self.path / "checkpoints"
        return self.averages().exists() or (kept.exists() and any(not p.name.startswith(".") for p in kept.iterdir()))

    def discard_state(self) -> None:
        """Delete the x0-state in the run directory, once the lock is held and unless the run has `trained`: a corrected
        configuration may need another one. Raises OSError or StoreError."""
        if self.exclusive and (self.path / "state").exists():
            shutil.rmtree(self.path / "state")

    @contextmanager
    def lock(self, patience: float | None = None) -> Iterator[None]:
        """Keep all other processes from writing to the run. Raises ConfigError or StoreError if one already is, and,
        before anything is changed, if there are files that are not a run's.

        `patience`: seconds to wait for another process to end, where waiting is possible; None: as long as a start
        waits.
        """
        check_free(self.path)
        with locked(self.path) as self.exclusive:
            yield

    @property
    def guard(self) -> Guard:
        """Checked before every change to the run, once this rank holds the lock or follows the rank that holds it."""
        return Guard()

    def download(self) -> None:
        """Make the local directory match the run, once the lock is held. Raises StoreError."""

    def check_visible(self, ranks: Ranks) -> None:
        """Check on every rank, once the first holds the lock, that the run is visible. Raises ConfigError or
        StoreError."""
        ranks.check_shared(self.path, "the run directory")

    def leave(self) -> None:
        """End on every rank what `check_visible` started."""

    def remove(self, name: str) -> None:
        """Delete a file of the run, if it exists, once the lock is held. Raises OSError or StoreError."""
        (self.path / name).unlink(missing_ok=True)
        sync_directory(self.path)

    def persist(self) -> None:
        """Make the files written to `path` survive a power loss: here those that are appended to, because all others
        are written durably. Errors are logged once, because metrics are not worth a run. Raises StoreError."""
        with self._metrics.attempt():
            files = [file for pattern in APPENDED for file in self.path.glob(pattern)]
            for file in files:
                sync_file(file)
            for directory in {file.parent for file in files}:
                sync_directory(directory)


@contextmanager
def locked(run_dir: Path) -> Iterator[bool]:
    """Create the directory and lock it. Yields whether it is locked: on a file system without locks, it is used all the
    same, with a warning.

    Raises ConfigError if it is not writable or another process holds the lock.
    """
    try:
        make_directory(run_dir)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        problem = f"cannot write to the run directory {run_dir}: {error}; choose another with --run-dir"
        raise ConfigError(problem) from error
    try:
        exclusive = lock_file(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        problem = f"another process is training in {run_dir}; wait for it or choose another --run-dir"
        raise ConfigError(problem) from None
    if not exclusive:
        log.warning(f"the file system of {run_dir} has no locks: make sure that no other process trains there")
    try:
        yield exclusive
    finally:
        os.close(descriptor)


LOGS = (".err", ".log", ".out", ".txt")
"""Files that may be in the directory of a new run: what a shell or a job scheduler writes for it."""
MOUNT = "lost+found"
"""What an empty file system holds at its root."""


def check_free(run_dir: Path) -> None:
    """Raise ConfigError if a directory is neither that of a run, nor empty, apart from hidden files and `LOGS`."""
    if run_dir.is_dir():
        check_names(run_dir, [path.name for path in run_dir.iterdir()])
    elif run_dir.exists():
        raise ConfigError(f"the run directory {run_dir} is a file; choose another with --run-dir")


def check_names(where: Path | str, names: Iterable[str]) -> None:
    """`check_free` of the names in a directory or at a URL."""
    found = sorted(name for name in names if not name.startswith(".") and not name.endswith(LOGS) and name != MOUNT)
    if "run.json" in found:
        return
    if "checkpoints" in found:
        raise ConfigError(f"{where} holds checkpoints but no run.json; restore that file or choose another --run-dir")
    if mine := [name for name in OWN_FILES if name in found]:
        raise ConfigError(
            f"{where} holds {', '.join(mine)} but no run.json, so they are not this run's and would be written over: "
            "choose an empty directory with --run-dir, or move them away"
        )
    if found:
        listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ConfigError(
            f"{where} is not a run, and it is not empty ({listed}): choose a new directory with --run-dir, such as "
            f"{where}/run"
        )


def run_id(run_dir: Path) -> str:
    """The unique id of a run, which stays the same when its directory is moved; "" if it has no `run.json`."""
    path = run_dir / "run.json"
    return str(load_json(path, "config").get("id", "")) if path.exists() else ""


def _check(path: Path, config: RunConfig, dataset: ImageDataset) -> None:
    """Raise ConfigError or DataError unless `run.json` is that of a run of this configuration and data set."""
    recorded = load_json(path, "config", "dataset")
    begun = resolve(recorded["config"], str(path))  # settings new since then had the default's behavior
    if begun.fingerprint() != config.fingerprint():
        decisive = [
            line
            for line in differences(begun.model_dump(mode="json"), config.model_dump(mode="json"))
            if line.split(":")[0] not in RunConfig.changeable() and line.split(".")[0] not in RunConfig.changeable()
        ]
        raise ConfigError(
            f"{path.parent} belongs to a run of another configuration ({'; '.join(decisive)}); "
            "use that configuration to resume it, or another --run-dir"
        )
    current = dataset.fingerprint()
    if config.network.classes:  # a run that learned other labels cannot go on with these
        current.pop("earlier_digest", None)
    check_unchanged(recorded["dataset"], current)


def recorded_order(run_dir: Path, config: RunConfig) -> OrderConfig | None:
    """The order of the run in a directory, with what `config` sets; None if there is no run.

    The lanes that a run had by default stay its own, whatever the default of this version is.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return None
    begun = resolve(load_json(path, "config")["config"], str(path)).order
    given = {key: value for key, value in config.order if value is not None}
    return begun.model_copy(update=given)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, as `key: old -> new`."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def check_or_record(run_dir: Path, config: RunConfig, dataset: ImageDataset, *, trained: bool = True) -> None:
    """Record the configuration and data set of a new run, or check that those of an existing run are unchanged.

    A directory whose run has not `trained` yet, because its first start failed, takes another configuration or data
    set. Raises ConfigError if the directory belongs to another configuration, DataError if the data set changed.
    """
    path = run_dir / "run.json"
    resolved = config.model_dump(mode="json")
    if path.exists():
        try:
            _check(path, config, dataset)
        except (ConfigError, DataError) as error:
            if trained:
                raise
            log.info(f"starting again in {run_dir}, which has no checkpoint yet: {error}")
            write_json(path, {"id": run_id(run_dir), "config": resolved, "dataset": dataset.fingerprint()})
            (run_dir / "config.yaml").unlink(missing_ok=True)
        if not (run_dir / "config.yaml").exists():  # the first start was killed between the two files
            write_text(run_dir / "config.yaml", as_yaml(resolved, flow=False))
        return
    check_free(run_dir)
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
