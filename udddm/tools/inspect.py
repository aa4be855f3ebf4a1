"""Inspect a store without writing to it, also while a run is using it: the output of `udddm-store`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from udddm.config import RunConfig, resolve
from udddm.errors import CheckpointError, StoreError
from udddm.files import load_json
from udddm.runs.remote import open_copy
from udddm.runs.run import Run
from udddm.storage import local_path, open_object_store
from udddm.store.encoding import Rows
from udddm.store.generations import Checksums, Generations, generation_name, open_existing
from udddm.store.snapshot import Snapshot, read_header

_TURNS = 5
"""How many times the changing checkpoints of a live run are listed before the last list is used."""


@dataclass
class Place:
    """The run or store at a path or URL given to `udddm-store`."""

    name: str
    generations: Generations | None
    """The zarr store, if there is one."""
    run: Run | None = None
    config: RunConfig | None = None
    checkpoints: list[Path] = field(default_factory=list)


def find(path: str) -> Place:
    """Open a run (its store and checkpoints) or a store at a path or URL. Raises StoreError if it is neither."""
    run = open_copy(path)
    if (run.path / "run.json").exists():
        return of_run(path, run)
    if local_path(path) is not None and not run.path.exists():
        raise StoreError(f"{path} does not exist")
    return Place(path, open_existing(open_object_store(path)))


def of_run(name: str, run: Run) -> Place:
    """The current store and checkpoints of a run. Raises StoreError, CheckpointError."""
    file = run.path / "run.json"
    config = resolve(load_json(file, "config")["config"], str(file))
    kept = run.checkpoints()
    for _ in range(_TURNS):
        checkpoints = kept.all()
        for checkpoint in checkpoints:
            with suppress(CheckpointError):  # `verify` reports it
                kept.ensure_local(checkpoint)
        if kept.all() == checkpoints:
            break  # else a live run has written or deleted some meanwhile
    objects = open_object_store(_url_in_use(checkpoints, config) or run.state)
    stored = open_existing(objects) if objects.exists("zarr.json") else None
    return Place(name, stored, run, config, checkpoints)


def _url_in_use(checkpoints: list[Path], config: RunConfig) -> str | None:
    """The store URL of the newest checkpoint, because a run may be resumed with a different `store.url`."""
    with suppress(StoreError):  # `verify` reports a damaged checkpoint
        if checkpoints and (header := _header(checkpoints[-1]))["form"] == "reference":
            url: str | None = header["url"]
            return url
    return config.store.url


def info(place: Place) -> list[str]:
    """Lines that describe a store: its content, its generations, and their size on disk."""
    lines = []
    if place.generations is not None:
        stored = place.generations
        order = stored.order
        lines += [
            f"store: {stored.objects.uri('')}",
            f"samples: {order.samples} of {'x'.join(map(str, stored.shape))}, {stored.encoding.name}",
            f"layout: {order.num_lanes} lanes, {order.num_chunks(0)} chunks per lane of {order.chunk_size} samples "
            f"({stored.chunk_bytes / 2**20:.2f} MiB), windows of {order.chunks_per_window} chunks",
        ]
        for generation in stored.existing():
            complete = len(stored.complete_lanes(generation))
            word = "complete" if complete == order.num_lanes else f"{complete} of {order.num_lanes} lanes complete"
            chunks = sum(order.num_chunks(lane) for lane in range(order.num_lanes))
            size = chunks * stored.chunk_bytes / 2**20
            lines.append(f"{generation_name(generation)}: {word}, {size:.1f} MiB when complete")
        if not stored.existing():
            lines.append("no generation is stored yet")
    elif place.config is not None:
        lines.append(
            f"no zarr store (store.kind={place.config.store.kind}): the x0-state is in memory, or where that store "
            "keeps it, and in the checkpoints"
        )
    for path in place.checkpoints:
        try:
            header = _header(path)
        except StoreError:
            if _removed(place, path):
                continue
            raise
        form = {
            "full": "all rows",
            "reference": f"refers to {generation_name(header['epoch'])}",
            "none": "no x0-state, because the objective does not read it",
        }[header["form"]]
        lines.append(f"{path.name}: epoch {header['epoch']}, step {header['step']} of the epoch; {form}")
    return lines


def _removed(place: Place, checkpoint: Path) -> bool:
    """Whether a live run has deleted the checkpoint since it was listed."""
    return place.run is not None and checkpoint not in place.run.checkpoints().all()


def _header(checkpoint: Path) -> dict[str, Any]:
    return read_header(checkpoint / "state")


def verify(place: Place) -> tuple[int, list[str]]:
    """Read every chunk of every complete lane, and every checkpoint with the chunks that it refers to.

    Returns the number of chunks read, and a line for each damaged item.
    """
    damaged: list[str] = []
    read: set[tuple[str, int, int, int]] = set()

    def check(stored: Generations, generation: int, lane: int, checksums: Checksums) -> list[str]:
        problems = []
        for chunk, expected in checksums.items():
            place = (stored.objects.uri(""), generation, lane, chunk)
            if place not in read:
                read.add(place)
                try:
                    stored.read(generation, lane, chunk, expected)
                except StoreError as error:
                    problems.append(str(error))
        return problems

    if place.generations is not None:
        stored = place.generations
        for generation in stored.existing():
            for lane in stored.complete_lanes(generation):
                try:
                    problems = check(stored, generation, lane, stored.record(generation, lane))
                except StoreError as error:
                    problems = [str(error)]
                if problems and lane in stored.complete_lanes(generation):  # else a live run has just deleted it
                    damaged += problems
    kept = place.run.checkpoints() if place.run is not None else None
    for path in place.checkpoints:
        assert kept is not None
        try:
            problem = kept.corruption(path)
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            try:
                problems = _check_references(path, place, check)
            except (StoreError, OSError) as error:
                problems = [str(error)]
        else:
            problems = [problem]
        if problems and path in kept.all():  # else a live run has just deleted it
            damaged += [f"checkpoint {path.name}: {problem}" for problem in problems]
    return len(read), damaged


def _check_references(
    path: Path, place: Place, check: Callable[[Generations, int, int, Checksums], list[str]]
) -> list[str]:
    """Damage in the generations that a checkpoint refers to, as far as it is not listed yet."""
    assert place.run is not None
    snapshot = Snapshot(path / "state", place.run.state)
    problems: list[str] = []
    for lane in range(snapshot.order.num_lanes) if snapshot.form == "reference" else ():
        try:
            if snapshot.epoch:
                problems += check(snapshot.generations, snapshot.epoch, lane, snapshot.base(lane))
            problems += check(snapshot.generations, snapshot.epoch + 1, lane, snapshot.written(lane))
            for window in snapshot.windows_in_flight(lane):
                snapshot.in_flight(lane, window)
        except StoreError as error:
            problems.append(str(error))
    return problems


def estimates(place: Place, sample: int) -> list[tuple[str, torch.Tensor]]:
    """A sample's stored estimates [C, H, W], oldest first, each with the name of its generation or checkpoint.

    Raises StoreError if there are none, or no such sample.
    """
    found: list[tuple[str, torch.Tensor]] = []
    if place.generations is not None:
        stored = place.generations
        lane, chunk, row = stored.order.locate(sample)
        for generation in stored.existing():
            if lane in stored.complete_lanes(generation):
                try:
                    rows = stored.read(generation, lane, chunk, stored.record(generation, lane)[chunk])
                except StoreError:
                    if lane in stored.complete_lanes(generation):
                        raise
                    continue  # a live run has just deleted it
                found.append((generation_name(generation), _decoded(stored, rows, row)))
    for path in place.checkpoints:
        try:
            value = _of_checkpoint(place, path, sample, needed=not found)
        except StoreError:
            if not _removed(place, path):
                raise
            continue
        if value is not None:
            found.append((path.name, value))
    if not found:
        why = f"holds no complete generation of sample {sample} yet"
        with suppress(StoreError):  # a live run may have deleted the checkpoint since it was listed
            if place.checkpoints and _header(place.checkpoints[-1])["form"] == "none":
                why = "keeps no x0-state, because its objective does not read it"
        raise StoreError(f"{place.name} {why}")
    return found


def _of_checkpoint(place: Place, path: Path, sample: int, *, needed: bool) -> torch.Tensor | None:
    """A sample's estimate in a checkpoint that holds all rows, or, if `needed`, also in one that refers to them."""
    assert place.run is not None
    form = _header(path)["form"]
    if form == "none" or (form != "full" and not needed):
        return None
    snapshot = Snapshot(path / "state", place.run.state)
    lane, chunk, row = snapshot.order.locate(sample)
    rows = snapshot.rows(lane, chunk)
    return snapshot.encoding.decode(snapshot.encoding.to_tensor(rows.copy()))[row]


def _decoded(stored: Generations, rows: Rows, row: int) -> torch.Tensor:
    return stored.encoding.decode(stored.encoding.to_tensor(rows.copy()))[row]
