"""Checkpoints: `<run>/checkpoints/step-00012000/`, complete or absent, and verified before use.

    model.safetensors  ema-<name>.safetensors  optimizer.safetensors   weights, EMAs, moments (runs/weights.py)
    config.json        the resolved configuration and the image shape: with the weights, all that sampling needs
    position.json      the step
    state/             the x0-state snapshot (udddm/store/snapshot.py); never inside a model file
    manifest.json      size and CRC32C of every file above; written last

A checkpoint is written under a temporary name and renamed once its manifest is durable. Nothing in it is pickled.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import google_crc32c
from safetensors import SafetensorError

from udddm.backends.distributed.ranks import Ranks
from udddm.config import RunConfig, resolve
from udddm.errors import CheckpointError, RankError, StoreError, Unreadable
from udddm.files import load_json, make_directory, read_patiently, sync_directory, sync_file, write_text
from udddm.log import log
from udddm.runs import manifest
from udddm.runs.manifest import MANIFEST, Entries

T = TypeVar("T")
NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 16 << 20
LARGEST_SIDE = 1 << 16
"""Largest image size that a checkpoint may declare."""


def _crc(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = int(google_crc32c.extend(checksum, block))
    return checksum


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run_dir: Path):
        self.directory = run_dir / "checkpoints"

    def all(self) -> list[Path]:
        """All published checkpoints, oldest first, valid or not. Raises Unreadable, StoreError."""

        def listed() -> list[Path]:
            if not self.directory.is_dir():
                return []
            return sorted((p for p in self.directory.iterdir() if NAME.fullmatch(p.name)), key=step_of)

        return read_patiently(self.directory, listed)

    def newest_valid(self) -> Path | None:
        """The newest valid checkpoint, or None if there are no checkpoints. Logs a warning for every newer invalid one.

        Raises CheckpointError if there are checkpoints but none is valid, or if one cannot be read.
        """
        found = self.all()
        problems: list[str] = []
        left = list(found)
        while left:
            path = left.pop()
            problem = self.corruption(path)
            if problem is None:
                return path
            if path not in (current := self.all()) and current:  # a live run has deleted it: start over
                found, left, problems = current, list(current), []
                continue
            problems.append(problem)
            log.warning("checkpoint %s is not valid and is skipped: %s", path.name, problem)
        if found:
            raise CheckpointError(
                f"no checkpoint in {self.name(self.directory)} is valid: {'; '.join(problems)}. "
                "Restore one from a copy, or start a new run directory"
            )
        return None

    def corruption(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; None if it is valid. Raises Unreadable, StoreError."""
        return corruption(path)

    def ensure_local(self, path: Path) -> None:
        """Make a checkpoint's files available on this machine if they are stored elsewhere. Called once per machine."""

    def write(self, step: int, ranks: Ranks, fill: Callable[[Path], None]) -> Path:
        """Write the checkpoint of `step`: every rank's `fill(directory)` adds its files, then it becomes visible.

        Each rank fills a separate directory and reports the files that it wrote there, because its listing of a
        directory that several machines share may be a minute old. Raises CheckpointError on a full or read-only disk;
        earlier checkpoints are untouched.
        """
        final = self.directory / f"step-{step:08d}"
        partial = _hidden(final)
        own = self.directory / f".{final.name}.rank-{ranks.rank}.partial"

        def make() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            make_directory(self.directory)
            partial.mkdir()
            if ranks.is_rank_zero:
                self._announce(final)

        def add() -> Entries:
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True)
            fill(own)
            entries = {}
            for path in sorted(p for p in own.rglob("*") if p.is_file()):
                name = path.relative_to(own).as_posix()
                entries[name] = {"bytes": path.stat().st_size, "crc32c": _crc(path)}
                self._keep(path, f"{final.name}/{name}")
            return entries

        errors = (OSError, SafetensorError, StoreError)  # safetensors wraps the error of a full disk
        try:
            ranks.run_on_rank_zero(make, errors)
            added = ranks.gather(ranks.run_on_all(add, errors))
            entries = {name: entry for part in added for name, entry in part.items()}
            ranks.run_on_rank_zero(lambda: self._publish(partial, final, entries), errors)
        except (*errors, RankError) as error:
            problem = f"cannot write the checkpoint {self.name(final)}: {error}"
            if isinstance(error, StoreError):  # it says what to do
                raise CheckpointError(problem) from error
            raise CheckpointError(
                f"{problem}. Earlier checkpoints are intact; make room or restore access, then run the same command "
                "again to resume"
            ) from error
        finally:
            shutil.rmtree(own, ignore_errors=True)
            if ranks.is_rank_zero:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    def name(self, path: Path) -> str:
        """A checkpoint's name in messages."""
        return str(path)

    def _announce(self, final: Path) -> None:
        """Called before the first file of a checkpoint is stored."""

    def _keep(self, path: Path, key: str) -> None:
        """Store a file that this rank wrote in the new checkpoint, under `<checkpoint>/<name>`."""
        sync_file(path)
        checkpoint, _, name = key.partition("/")
        target = _hidden(self.directory / checkpoint) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)

    def _publish(self, partial: Path, final: Path, entries: Entries) -> None:
        write_text(partial / MANIFEST, manifest.dumps(entries))
        if final.exists():  # invalid, left by an attempt that did not resume from it
            shutil.rmtree(final)
        for directory in [p for p in partial.rglob("*") if p.is_dir()]:
            sync_directory(directory)
        partial.rename(final)
        sync_directory(self.directory)

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` once the newest is verified, and leftovers of interrupted writes."""
        with suppress(Unreadable):  # retried at the next checkpoint
            found = self.all()
            whole = bool(found) and corruption(found[-1]) is None
            for old in found[:-keep] if whole else ():
                self._remove(old)
        with suppress(OSError):
            for leftover in self.directory.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)

    def discard_after(self, step: int) -> list[str]:
        """Set aside the checkpoints newer than the one that is resumed. They are not valid, and training will write
        them again. Returns what was done with each, for a message."""
        return [self._set_aside(path) for path in self.all() if step_of(path) > step]

    def _set_aside(self, path: Path) -> str:
        """Rename an invalid checkpoint, so that the user can find out what happened to it."""
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        return f"{path.name} is kept as {aside}; delete it if you do not need it"

    def _remove(self, path: Path) -> None:
        """Hide a checkpoint atomically, then delete it."""
        hidden = _hidden(path)
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _hidden(path: Path) -> Path:
    """A checkpoint's name while it is written or deleted."""
    return path.with_name(f".{path.name}.partial")


def corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every file matches the manifest.

    A file that is missing or has different contents is corrupt. A file that cannot be read (a network file system that
    does not answer, missing permissions, no file descriptors left) is not: raises Unreadable after a few attempts.
    """
    return read_patiently(path, lambda: _corruption(path))


def _corruption(path: Path) -> str | None:
    """One attempt at `corruption`. Raises OSError if a file exists and cannot be read."""
    name = MANIFEST
    try:
        entries = manifest.read(path)
        for name, entry in entries.items():
            file = path / name
            if problem := manifest.not_plain(path, name):
                return problem
            if file.stat().st_size != entry["bytes"]:
                return f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if _crc(file) != entry["crc32c"]:
                return f"{file} does not match its checksum"
    except (FileNotFoundError, NotADirectoryError):
        return f"{path / name} is missing"
    except ValueError as error:
        return f"{path / MANIFEST} cannot be read: {error}"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"{path / name} is a link to itself"
        raise
    return None


def load_step(directory: Path) -> int:
    """The step of a checkpoint. Raises CheckpointError."""
    path = directory / "position.json"
    step = load_json(path, "step")["step"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"cannot read {path}: its step is {step!r}, not a number of steps")
    return step


def load_config(directory: Path) -> tuple[RunConfig, tuple[int, int, int]]:
    """The configuration of a checkpoint and the shape of its images. Raises CheckpointError, ConfigError."""
    path = directory / "config.json"
    found = load_json(path, "config", "shape")
    shape = found["shape"]
    numbers = isinstance(shape, list) and [side for side in shape if type(side) is int and 0 < side <= LARGEST_SIDE]
    if not numbers or numbers != shape or len(shape) != 3:
        raise CheckpointError(f"cannot read {path}: its shape is {shape!r}, not [channels, height, width]")
    channels, height, width = shape
    return resolve(found["config"], str(path)), (channels, height, width)
