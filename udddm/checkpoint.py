"""Checkpoints: `<run>/checkpoints/step-00012000/`, complete or absent, verified before they are used.

    model.safetensors  ema-<name>.safetensors  optimizer.safetensors    weights, averages, moments (udddm/portable.py)
    config.json        the resolved configuration and the image shape: with the weights, all that sampling needs
    position.json      the step
    state/             the x0-state snapshot (udddm/store/snapshot.py); never inside a model file
    manifest.json      size and CRC32C of every file above; written last

A checkpoint is written under a temporary name and renamed when its manifest is durable. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
from safetensors import SafetensorError

from udddm.backends.ranks import RankError, Ranks
from udddm.errors import CheckpointError, StoreError

Entries = dict[str, dict[str, int]]
"""A manifest: of every file its size in bytes and its CRC32C."""

NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 16 << 20


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write durably and atomically."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    sync_file(temporary)
    temporary.replace(path)


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

    def __init__(self, run: Path):
        self.directory = run / "checkpoints"

    def all(self) -> list[Path]:
        """Named checkpoints, oldest first, valid or not."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if NAME.fullmatch(p.name)), key=step_of)

    def newest_valid(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that verifies; says which newer ones do not, and why. None when there is none at all.

        Raises CheckpointError when there are checkpoints but none is whole.
        """
        found = self.all()
        problems = []
        for path in reversed(found):
            problem = self.damage(path)
            if problem is None:
                return path
            problems.append(problem)
            say(f"checkpoint {path.name} is not whole and is passed over: {problem}")
        if found:
            raise CheckpointError(
                f"no checkpoint in {self.name(self.directory)} is whole: {'; '.join(problems)}. "
                "Restore one from a copy, or start a new run directory"
            )
        return None

    def damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; None when it is whole."""
        return damage(path)

    def bring(self, path: Path) -> None:
        """Make a checkpoint's files readable here, where they are kept elsewhere. Called once on every machine."""

    def write(self, step: int, ranks: Ranks, fill: Callable[[Path], None]) -> Path:
        """Make the checkpoint of `step`: every rank's `fill(directory)` adds its files, then it becomes visible.

        Raises CheckpointError on a full or read-only disk; what was there before is untouched.
        """
        keeps = self._keeps(ranks)
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f".{final.name}.partial"

        def make() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if ranks.first:
                self._announce(final)

        def seal() -> Entries:
            files = sorted(p for p in partial.rglob("*") if p.is_file())
            entries = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "crc32c": _crc(p)} for p in files}
            for path in files:
                self._keep(path, f"{final.name}/{path.relative_to(partial)}")
            return entries

        errors = (OSError, SafetensorError, StoreError)  # safetensors wraps a full disk in its own
        try:
            ranks.together(lambda: make() if keeps else None, errors)
            ranks.together(lambda: fill(partial), errors)
            sealed = ranks.gather(ranks.together(lambda: seal() if keeps else {}, errors))
            entries = {name: entry for part in sealed for name, entry in part.items()}
            ranks.first_only(lambda: self._publish(partial, final, entries), errors)
        except (*errors, RankError) as error:
            raise CheckpointError(
                f"cannot write the checkpoint {self.name(final)}: {error}. Earlier checkpoints are intact; "
                "make room or restore access, then run the same command again to resume"
            ) from error
        finally:
            if keeps:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    def name(self, path: Path) -> str:
        """What a message calls a checkpoint."""
        return str(path)

    def _keeps(self, ranks: Ranks) -> bool:
        """Whether this rank makes a directory, and puts away what the ranks that see it write there."""
        return ranks.first

    def _announce(self, final: Path) -> None:
        """Before the first file of a checkpoint comes to where it is kept."""

    def _keep(self, path: Path, key: str) -> None:
        sync_file(path)

    def _publish(self, partial: Path, final: Path, entries: Entries) -> None:
        write_json(partial / "manifest.json", entries)
        if final.exists():  # left there by a run that did not resume from it: it was not whole
            shutil.rmtree(final)
        partial.rename(final)
        _sync_directory(self.directory)

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep`, once the newest verifies; and leftovers of interrupted writes."""
        found = self.all()
        if found and damage(found[-1]) is None:
            for old in found[:-keep]:
                self._remove(old)
        for leftover in self.directory.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def discard_after(self, step: int) -> None:
        """Remove checkpoints newer than the one that is resumed: they are not whole, and training passes them again."""
        for path in self.all():
            if step_of(path) > step:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Make a checkpoint invisible at once, then remove it."""
        hidden = path.with_name(f".{path.name}.partial")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when every file is as its manifest says."""
    try:
        entries = json.loads((path / "manifest.json").read_text())
        for name, entry in entries.items():
            file = path / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if _crc(file) != entry["crc32c"]:
                return f"{file} does not match its checksum"
    except FileNotFoundError:
        return f"{path / 'manifest.json'} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path} cannot be read: {error!r}"
    return None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def load_json(path: Path) -> Any:
    """Raises CheckpointError."""
    with _explained(path):
        return json.loads(path.read_text())
