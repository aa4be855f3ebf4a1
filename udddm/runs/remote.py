"""A run at a URL: `--run-dir s3://bucket/run`. The run does not depend on anything on a machine's disk.

Ranks write to a local directory under `UDDDM_SCRATCH` (default: ~/.cache/udddm), which is uploaded to the URL:
checkpoints when they are written, with the manifest last, and metrics, TensorBoard files and sample images along with
them. A start uses only what is at the URL. A lease (udddm/storage/lease.py) keeps out other machines, and a lock keeps
out other processes on this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from udddm.backends.distributed.lease import follow
from udddm.backends.distributed.ranks import Ranks
from udddm.errors import CheckpointError, Unreadable
from udddm.files import expanded, home_cache, write_json
from udddm.runs import manifest
from udddm.runs.checkpoint import NAME, Checkpoints, corruption, step_of
from udddm.runs.manifest import MANIFEST, Entries
from udddm.runs.run import AVERAGES, BESIDE, PICTURES, Run, check_names, locked
from udddm.storage import local_path, open_object_store
from udddm.storage.base import ObjectStore
from udddm.storage.guard import Guard
from udddm.storage.lease import KEY as LEASE
from udddm.storage.lease import Lease, process_table
from udddm.store.zarr import LEASE_PATIENCE

SCRATCH = "UDDDM_SCRATCH"
"""Environment variable: local directory for the files of runs at URLs before they are uploaded."""
OPTIONAL = ("spikes.json", "best/scores.json")
FETCHED = ("run.json", "config.yaml", "metrics.jsonl", "evaluation.jsonl", "result.json", *OPTIONAL)
"""Files that a run appends to or reads again: all that it writes at the top of its directory, except the final samples,
and the scores of its best weights."""
WRITER = "writer.json"
"""File in a checkpoint: the lease under which its write was started."""


def scratch() -> Path:
    configured = os.environ.get(SCRATCH)
    return expanded(configured) if configured else home_cache()


def open_run(where: str | Path) -> Run:
    """Open the run in a directory or at a URL, which need not exist yet. Raises StoreError if the URL is malformed."""
    local = local_path(where)
    if local is not None:
        return Run(local)
    url = str(where).rstrip("/")
    return RemoteRun(url, scratch() / f"{url.rpartition('/')[2]}-{_digest(url)}" / _machine())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _machine() -> str:
    """A directory name for this machine, because several machines often share a home directory."""
    try:
        number = Path("/etc/machine-id").read_text().strip()
    except OSError:
        number = ""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    return f"{host}-{_digest(number)}" if number else host


def open_copy(where: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> Run:
    """Open a run for reading. The contents of a run at a URL are in a temporary directory that exists as long as the
    result. `wanted` selects the needed files of a checkpoint. Raises StoreError."""
    if local_path(where) is not None:
        return open_run(where)
    run = RemoteRun(str(where).rstrip("/"), None, wanted)
    run.download()
    return run


class RemoteCheckpoints(Checkpoints):
    """Checkpoints at a URL, complete once their manifest exists. Paths are those of the copies on this machine."""

    def __init__(self, run_dir: Path, objects: ObjectStore, wanted: Callable[[str], bool] = lambda name: True):
        super().__init__(run_dir)
        self.objects, self.wanted = objects, wanted
        self._left: set[Path] = set()

    def all(self) -> list[Path]:
        names = [name for name in self.objects.list("") if NAME.fullmatch(name)]
        return sorted((self.directory / n for n in names if self.objects.exists(f"{n}/{MANIFEST}")), key=step_of)

    def name(self, path: Path) -> str:
        return self.objects.uri("" if path == self.directory else path.name)

    def ensure_local(self, path: Path) -> None:
        """Raises CheckpointError if the checkpoint is not complete, StoreError if it cannot be read."""
        if (path / MANIFEST).exists() and corruption(path) is None:
            return
        shutil.rmtree(path, ignore_errors=True)
        key = f"{path.name}/{MANIFEST}"
        try:
            path.mkdir(parents=True)
            self.objects.download(key, path / MANIFEST, manifest.LARGEST)
            entries = {n: e for n, e in manifest.read(path).items() if self.wanted(n)}
            for name, entry in entries.items():
                key = f"{path.name}/{name}"
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                self.objects.download(key, path / name, entry["bytes"])
        except FileNotFoundError:
            raise CheckpointError(f"{self.objects.uri(key)} is missing") from None
        except ValueError as error:
            raise CheckpointError(f"{self.objects.uri(key)} cannot be read: {error}") from error
        write_json(path / MANIFEST, entries)

    def corruption(self, path: Path) -> str | None:
        try:
            self.ensure_local(path)
        except Unreadable:
            raise
        except CheckpointError as error:
            return str(error)
        problem = corruption(path)
        return problem and problem.replace(str(path), self.name(path))

    def _keep(self, path: Path, key: str) -> None:
        self.objects.upload(path, key)

    def newest_valid(self) -> Path | None:
        self._left = self._unfinished()
        return super().newest_valid()

    def _unfinished(self) -> set[Path]:
        """Checkpoints without a manifest: left by an interrupted write, or being written."""
        return {self.directory / n for n in self.objects.list("") if NAME.fullmatch(n)} - set(self.all())

    def _announce(self, final: Path) -> None:
        """Record which lease is about to write files, so that another run's start does not delete them."""
        self.objects.delete(final.name)  # invalid, left by an attempt that did not resume from it
        if isinstance(lease := self.objects.guard, Lease):
            self.objects.put(f"{final.name}/{WRITER}", json.dumps({"lease": lease.id}).encode())

    def _publish(self, partial: Path, final: Path, entries: Entries) -> None:
        self.objects.put(f"{final.name}/{MANIFEST}", manifest.dumps(entries).encode())

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` once the newest is complete, and leftovers of interrupted writes.

        Of the leftovers, only this process's, and those from before it held the run; a successor is writing the others.
        """
        found = self.all()
        unfinished = {path for path in self._unfinished() if self._own(path)}
        if found and (problem := self._missing(found[-1])):
            self.objects.guard.confirm()
            raise CheckpointError(
                f"{problem}, although it was just written. Older checkpoints stay; run the same command again to resume"
            )
        for old in [*found[:-keep], *unfinished]:
            self._remove(old)

    def _set_aside(self, path: Path) -> str:
        self._remove(path)  # an object cannot be renamed
        return f"{path.name} is deleted"

    def _own(self, path: Path) -> bool:
        lease = self.objects.guard
        if not isinstance(lease, Lease) or path in self._left:
            return True
        try:
            return bool(json.loads(self.objects.get(f"{path.name}/{WRITER}"))["lease"] == lease.id)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def _missing(self, path: Path) -> str:
        """Which object of a checkpoint is missing or differs in size from its manifest entry; "" if none."""
        sizes = self.objects.sizes(path.name)
        try:
            entries = manifest.parse(self.objects.get(f"{path.name}/{MANIFEST}"))
        except (FileNotFoundError, ValueError) as error:
            return f"{self.objects.uri(f'{path.name}/{MANIFEST}')} cannot be read ({error})"
        for name, entry in entries.items():
            where = self.objects.uri(f"{path.name}/{name}")
            if name not in sizes:
                return f"{where} is missing"
            if sizes[name] != entry["bytes"]:
                return f"{where} has {sizes[name]} bytes instead of {entry['bytes']}"
        return ""

    def _remove(self, path: Path) -> None:
        self.objects.delete(f"{path.name}/{MANIFEST}")
        self.objects.delete(path.name)
        shutil.rmtree(path, ignore_errors=True)


class RemoteRun(Run):
    """A run at a URL. `path` is the local directory for files to be uploaded; None: a temporary directory."""

    def __init__(self, url: str, path: Path | None, wanted: Callable[[str], bool] = lambda name: True):
        super().__init__(path or Path(tempfile.mkdtemp(prefix="udddm-")))
        if path is None:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self.url, self.wanted, self.objects = url, wanted, open_object_store(url)
        self._lease: Lease | None = None  # on a separate ObjectStore: the run's is guarded by it
        self._pushed: dict[str, tuple[int, int]] = {}

    def __str__(self) -> str:
        return self.url

    @property
    def state(self) -> str | Path:
        return f"{self.url}/state"

    @property
    def identity(self) -> str:
        return self.url

    @property
    def guard(self) -> Guard:
        return self._lease or Guard()

    def checkpoints(self) -> Checkpoints:
        objects = open_object_store(f"{self.url}/checkpoints")
        objects.guard = self.guard
        return RemoteCheckpoints(self.path, objects, self.wanted)

    def averages(self) -> Path:
        for step in self.objects.list(AVERAGES):
            for name in self.objects.list(f"{AVERAGES}/{step}"):
                key = f"{AVERAGES}/{step}/{name}"
                (self.path / key).parent.mkdir(parents=True, exist_ok=True)
                self.objects.download(key, self.path / key)
        return self.path / AVERAGES

    def pictures(self) -> Path:
        for name in self.objects.list(PICTURES):
            if name in BESIDE or re.fullmatch(r"step-\d+\.png", name):
                (self.path / PICTURES).mkdir(parents=True, exist_ok=True)
                self.objects.download(f"{PICTURES}/{name}", self.path / PICTURES / name)
        return self.path / PICTURES

    def trained(self) -> bool:
        return any(self.objects.exists(name) for name in ("checkpoints", AVERAGES))

    def discard_state(self) -> None:
        self.objects.delete("state")

    @contextmanager
    def lock(self, patience: float | None = None) -> Iterator[None]:
        check_names(self.url, [name for name in self.objects.list("") if name != LEASE])
        with locked(self.path):
            lease = Lease(open_object_store(self.url), self.url)
            lease.acquire(patience=LEASE_PATIENCE if patience is None else patience)
            self._lease = self.objects.guard = lease
            try:
                yield
            finally:
                lease.release()

    def download(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif left.name != ".lock":
                left.unlink()
        for name in FETCHED:
            try:
                content = self.objects.get(name)
            except FileNotFoundError:
                (self.path / name).unlink(missing_ok=True)
            else:
                (self.path / name).parent.mkdir(exist_ok=True)
                (self.path / name).write_bytes(content)

    def check_visible(self, ranks: Ranks) -> None:
        if self._lease is None:
            self._lease = self.objects.guard = Lease(open_object_store(self.url), self.url)
        follow(self._lease, ranks)
        self._separate(ranks)
        if ranks.is_local_rank_zero and not ranks.is_rank_zero:
            self.download()

    def _separate(self, ranks: Ranks) -> None:
        """Give each machine a separate local directory.

        Machines that share a home directory may have the same name and id, as clones and containers have.
        """
        seen = ranks.gather((ranks.is_local_rank_zero, str(self.path), socket.gethostname(), process_table()))
        leaders = [rank for rank, (leads, *_) in enumerate(seen) if leads]
        mine = [rank for rank in leaders if rank <= ranks.rank and seen[rank][1:] == seen[ranks.rank][1:]]
        if mine and any(seen[rank][1] == str(self.path) for rank in leaders if rank < mine[-1]):
            self.path = self.path.with_name(f"{self.path.name}-rank-{mine[-1]}")

    def leave(self) -> None:
        if self._lease is not None:
            self._lease.release()

    def remove(self, name: str) -> None:
        super().remove(name)
        self.objects.delete(name)

    def persist(self) -> None:
        """Upload the files that changed since the last call, `result.json` after all others. Raises StoreError."""
        passed = {"checkpoints", ".lock", ".best"}
        files = [p for p in self.path.rglob("*") if p.is_file() and p.relative_to(self.path).parts[0] not in passed]
        for path in sorted(files, key=lambda p: (p.name == "result.json", p)):
            name, now = str(path.relative_to(self.path)), path.stat()
            seen = (now.st_mtime_ns, now.st_size)
            if path.suffix != ".partial" and self._pushed.get(name) != seen:
                self.objects.upload(path, name)
                self._pushed[name] = seen
