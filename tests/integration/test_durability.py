"""A power loss does not lose anything that a run reports as written. A record of a run's file system calls shows that
contents are synced before a file gets its final name, and every directory after it gets a new entry."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from udddm.cli.train import main as train_command
from udddm.files import atomic_write, make_directory, write_json


def record(events_file: Path, cache: Path, arguments: list[str]) -> None:
    """Run the command and write its file system calls. It runs in a new process, forked from the fork server."""
    events, lock = [], threading.Lock()

    def recorded(name: str, call: Any, paths: Callable[..., list[Any]]) -> Any:
        def traced(*arguments: Any, **options: Any) -> Any:
            found = [os.path.abspath(p) for p in paths(*arguments)]  # noqa: PTH100
            result = call(*arguments, **options)  # when it has succeeded
            with lock:
                events.append([name, *found])
            return result

        return traced

    os.fsync = recorded("fsync", os.fsync, lambda fd, *_: [os.readlink(f"/proc/self/fd/{fd}")])  # noqa: PTH115
    os.mkdir = recorded("mkdir", os.mkdir, lambda path, *_: [path])
    os.rename = recorded("rename", os.rename, lambda old, new: [old, new])
    os.replace = recorded("rename", os.replace, lambda old, new: [old, new])
    os.environ["UDDDM_CACHE"] = str(cache)
    sys.path.insert(0, str(events_file.parent))
    code = train_command(arguments)
    events_file.write_text(json.dumps(events))
    sys.exit(code)


SETTINGS = (
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], condition: none}",
    "order={lanes: 2, chunk: 64, window: 2}",
    "train={steps: 24, batch_size: 128, ema: [0.9], power_ema: [0.1], power_ema_every_steps: 12}",
    "checkpoint={every_steps: 8, keep: 2}",
    "sample={every_steps: 12, final: 8}",
    "evaluate={every_steps: 12, count: 8, features: 'features:flat'}",
    "log_every_steps=8",
)


class Event(NamedTuple):
    kind: str
    path: Path
    """A path that was synced or created; for a rename, the new name."""
    old: Path | None = None


@pytest.fixture(scope="module", params=[pytest.param("gpu", marks=pytest.mark.slow), "zarr"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[Event]]]:
    """A run directory two levels below an existing one, and the events of a run of 24 steps that was resumed from step
    16. In memory if there is such a file system, because a synced write to disk takes milliseconds."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path_factory.mktemp("durability")) as name:
        yield record_two_starts(Path(name), request.param)


def record_two_starts(place: Path, store: str) -> tuple[Path, list[Event]]:
    (place / "features.py").write_text("def flat(batch):\n    return batch.flatten(1)[:, :8]\n")
    run, events = place / "runs" / "one", []
    for resumed in (False, True):
        if resumed:  # as after a kill between the checkpoints of steps 16 and 24
            (run / "result.json").unlink()
            shutil.rmtree(run / "checkpoints" / "step-00000024")
        arguments = ["--run-dir", str(run), "--device", "cpu", "--store", store]
        for setting in SETTINGS:
            arguments += ["--set", setting]
        process = multiprocessing.get_context("forkserver").Process(
            target=record, args=(place / "events.json", place / "cache", arguments)
        )
        process.start()
        process.join(200)
        assert process.exitcode == 0
        for kind, *named in json.loads((place / "events.json").read_text()):
            events.append(Event(kind, Path(named[-1]), Path(named[0]) if len(named) > 1 else None))
    return run, [event for event in events if place in event.path.parents or event.path == place]


def synced_after(events: list[Event], number: int, path: Path) -> bool:
    return any(event.kind == "fsync" and event.path == path for event in events[number:])


def test_a_files_contents_are_synced_before_it_is_renamed(recorded: tuple[Path, list[Event]]) -> None:
    run, events = recorded
    checked = set()
    for number, event in enumerate(events):
        if (
            event.kind == "rename"
            and event.old is not None
            and event.old.suffix == ".partial"
            and not event.path.is_dir()
        ):
            if run.parent.parent / "cache" in event.path.parents or event.path.name.startswith("step-"):
                continue
            last = max(
                (i for i, e in enumerate(events[:number]) if e.path == event.old and e.kind == "rename"), default=0
            )
            assert any(e.kind == "fsync" and e.path == event.old for e in events[last:number]), event
            checked.add(event.path.name)
    assert {"run.json", "config.yaml", "metrics.jsonl", "evaluation.jsonl", "result.json", "samples.npy"} <= checked
    assert "power-0.1.safetensors" in checked


def test_a_directory_is_synced_after_every_new_name_in_it(recorded: tuple[Path, list[Event]]) -> None:
    """For the files that exist at the end. Everything in a checkpoint is named before the checkpoint itself."""
    run, events = recorded
    checked = set()
    for number, event in enumerate(events):
        named = event.kind in ("mkdir", "rename") and event.path.exists()
        if named and "tensorboard" not in event.path.parts:
            assert synced_after(events, number, event.path.parent), event
            checked.add(event.path)
    assert {run.parent, run, run / "checkpoints", run / "checkpoints" / "step-00000024", run / "ema"} <= checked
    assert (run / "state" in checked) == (run / "state").exists()


def test_a_checkpoints_files_are_durable_before_it_is_visible(recorded: tuple[Path, list[Event]]) -> None:
    run, events = recorded
    final = run / "checkpoints" / "step-00000024"
    shown, hidden = next((number, e.old) for number, e in enumerate(events) if e.kind == "rename" and e.path == final)
    assert hidden is not None
    came = [e for e in events[:shown] if e.kind == "rename" and hidden in e.path.parents]
    assert {e.path.relative_to(hidden) for e in came} >= {
        p.relative_to(final) for p in final.rglob("*") if p.is_file() and p.name != ".lock"
    }
    for event in came:
        number = events.index(event)
        assert event.old is not None
        assert any(e.kind == "fsync" and e.path == event.old for e in events[:number]), event
        assert synced_after(events[:shown], number, event.path.parent), event


def test_metrics_are_durable_before_every_checkpoint_and_before_the_result(
    recorded: tuple[Path, list[Event]],
) -> None:
    run, events = recorded
    step = re.compile(re.escape(f"{run}/checkpoints/") + r"step-\d+")
    shown = [
        number
        for number, event in enumerate(events)
        if event.kind == "rename" and (step.fullmatch(str(event.path)) or event.path == run / "result.json")
    ]
    assert len(shown) == 3 + 1 + 1 + 1  # checkpoints of both starts, and both results
    for before, number in zip([0, *shown], shown, strict=False):
        synced = {event.path for event in events[before:number] if event.kind == "fsync"}
        assert {run, run / "metrics.jsonl", run / "tensorboard"} <= synced
        assert any(path.parent.name == "tensorboard" for path in synced)


def test_a_generations_record_is_written_after_its_chunks_are_durable(recorded: tuple[Path, list[Event]]) -> None:
    run, events = recorded
    if not (run / "state").exists():
        return  # a store in memory
    records = [(n, e.path) for n, e in enumerate(events) if e.kind == "rename" and e.path.parent.name == "complete"]
    assert records
    for number, record in records:
        generation, lane = record.parent.parent, int(record.stem.removeprefix("lane-"))
        chunks = [
            (n, e)
            for n, e in enumerate(events[:number])
            if e.kind == "rename" and generation / "c" / str(lane) in e.path.parents
        ]
        assert chunks
        for made, chunk in chunks:
            for directory in chunk.path.parents[: len(chunk.path.relative_to(generation).parts)]:
                assert synced_after(events[:number], made, directory), (record, chunk, directory)


def test_a_failed_write_keeps_the_earlier_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    make_directory(path.parent)
    write_json(path, {"a": 1})
    before = path.read_bytes()
    for shared in (False, True):
        with pytest.raises(OSError, match=f"No space left on device: '{path.parent}/file.json"):
            atomic_write(path, lambda file: file.write(b"half") and full(), shared=shared)
        assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["file.json"]


def full() -> None:
    raise OSError(28, "No space left on device")


def test_a_shared_file_is_from_one_writer_or_the_other(tmp_path: Path) -> None:
    """A second writer starts after the first has written half of the file."""
    path = tmp_path / "cache.npz"

    def first(file) -> None:  # type: ignore[no-untyped-def]
        file.write(b"first")
        file.flush()
        atomic_write(path, lambda other: other.write(b"second"), shared=True)
        assert path.read_bytes() == b"second"
        file.write(b", all of it")

    atomic_write(path, first, shared=True)
    assert path.read_bytes() == b"first, all of it"
    assert not list(tmp_path.glob("*.partial"))
