"""Checkpoints are complete or absent, corruption is detected and named, and nothing else is lost."""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from udddm.backends.distributed.ranks import Ranks
from udddm.errors import CheckpointError
from udddm.files import load_json
from udddm.runs import checkpoint
from udddm.runs.checkpoint import Checkpoints, corruption, step_of
from udddm.runs.pretrained import read_checkpoint
from udddm.runs.weights import Saved

ALONE = Ranks(0, 1, torch.device("cpu"))


def fill(directory: Path) -> None:
    save_file({"weight": torch.arange(300.0)}, directory / "model.safetensors")
    (directory / "state").mkdir()
    (directory / "state" / "rows.bin").write_bytes(bytes(range(256)) * 10)


def test_a_written_checkpoint_is_valid(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).write(12, ALONE, fill)
    assert path.name == "step-00000012" and step_of(path) == 12
    assert corruption(path) is None
    assert torch.equal(Saved(path, "model")["weight"], torch.arange(300.0))
    assert Checkpoints(tmp_path).newest_valid() == path


def test_every_corruption_is_detected_and_names_its_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(60):
        checkpoints = Checkpoints(tmp_path / str(trial))
        path = checkpoints.write(1, ALONE, fill)
        victim = rng.choice([p for p in path.rglob("*") if p.is_file()])
        data = bytearray(victim.read_bytes())
        kind = rng.choice(["flip", "truncate", "delete"])
        if kind == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            victim.write_bytes(data)
        elif kind == "truncate":
            victim.write_bytes(data[: rng.randrange(len(data))])
        else:
            victim.unlink()
        problem = corruption(path)
        if problem is None:  # a flipped space in the manifest's layout does not change its content
            assert victim.name == "manifest.json" and kind == "flip"
            continue
        if victim.name != "manifest.json":
            assert victim.name in problem, (kind, victim, problem)
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.newest_valid()


def test_the_newest_valid_checkpoint_is_used_and_invalid_ones_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    older, newer = checkpoints.write(1, ALONE, fill), checkpoints.write(2, ALONE, fill)
    (newer / "model.safetensors").write_bytes(b"")
    assert checkpoints.newest_valid() == older
    assert "step-00000002" in caplog.text and "model.safetensors" in caplog.text
    assert "step-00000002.damaged" in checkpoints.discard_after(1)[0]
    assert checkpoints.all() == [older]
    assert {p.name for p in checkpoints.directory.iterdir()} == {older.name, "step-00000002.damaged"}
    newer = checkpoints.write(2, ALONE, fill)  # training writes this step again
    checkpoints.prune(1)
    assert checkpoints.all() == [newer] and (newer.with_name("step-00000002.damaged") / "manifest.json").exists()


@contextmanager
def no_more_files() -> Iterator[None]:
    """Every attempt to open a file fails (EMFILE), as on a machine without free file descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_unreadable_checkpoint_is_not_corrupt_and_nothing_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    paths = [checkpoints.write(step, ALONE, fill) for step in (1, 2, 3)]
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with no_more_files():
        with pytest.raises(CheckpointError, match=r"Too many open files.*nothing was removed"):
            checkpoints.newest_valid()
        with pytest.raises(CheckpointError, match=r"step-00000003: .*Too many open files.*nothing was removed"):
            corruption(paths[-1])
        assert len(pauses) == 6
        checkpoints.prune(1)
    assert checkpoints.all() == paths and all(corruption(path) is None for path in paths)


def test_a_checkpoint_readable_at_the_second_attempt_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    newest = [checkpoints.write(step, ALONE, fill) for step in (1, 2)][-1]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(time, "sleep", lambda seconds: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
    with no_more_files():
        assert checkpoints.newest_valid() == newest


def test_a_loop_of_links_is_corruption(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for name in ("model.safetensors", "state"):
        path = checkpoints.write(1, ALONE, fill)
        shutil.rmtree(path / name, ignore_errors=True)
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(path / name)
        assert name in str(corruption(path))


def test_old_checkpoints_are_deleted_only_once_the_newest_is_verified(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        newest = checkpoints.write(step, ALONE, fill)
    (newest / "model.safetensors").write_bytes(b"")
    checkpoints.prune(1)
    assert len(checkpoints.all()) == 3
    newest = checkpoints.write(3, ALONE, fill)  # replaces a corrupt one of the same step
    checkpoints.prune(1)
    assert checkpoints.all() == [newest]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_failed_write_keeps_earlier_checkpoints(tmp_path: Path, error: OSError) -> None:
    checkpoints = Checkpoints(tmp_path)
    kept = checkpoints.write(1, ALONE, fill)

    def failing(directory: Path) -> None:
        fill(directory)
        raise error

    with pytest.raises(CheckpointError, match="Earlier checkpoints are intact"):
        checkpoints.write(2, ALONE, failing)
    assert checkpoints.all() == [kept] and corruption(kept) is None
    assert [p.name for p in checkpoints.directory.iterdir()] == [kept.name]


def test_leftovers_of_a_killed_write_are_not_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_valid() is None
    partial = checkpoints.directory / ".step-00000005.partial"
    partial.mkdir(parents=True)
    fill(partial)
    assert checkpoints.newest_valid() is None
    path = checkpoints.write(5, ALONE, fill)
    checkpoints.prune(2)
    assert list(checkpoints.directory.iterdir()) == [path]


def test_weights_of_a_different_network_are_refused(tmp_path: Path) -> None:
    wanted = {"a": torch.Size([2, 3]), "b": torch.Size([1])}
    tensors = {name: torch.zeros(shape) for name, shape in wanted.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    Saved(tmp_path, "model").check_network(wanted)
    for found, word in (
        ({"a": torch.zeros(2, 3)}, "lacks b"),
        ({**tensors, "c": torch.zeros(1)}, "has c"),
        ({**tensors, "a": torch.zeros(3, 2)}, r"a is \[3, 2\]"),
    ):
        save_file(found, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=word):
            Saved(tmp_path, "model").check_network(wanted)


def test_unreadable_weight_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickle")
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "none.json"):
        with pytest.raises(CheckpointError, match=name):
            load_json(tmp_path / name)
    for kind in ("x", "none"):
        with pytest.raises(CheckpointError, match=f"{kind}.safetensors"):
            Saved(tmp_path, kind)


def test_a_missing_part_of_several_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="1 of 3 files model-"):
        Saved(tmp_path, "model")


def test_a_checkpoint_that_a_live_run_deletes_while_it_is_verified_is_replaced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Checkpoints(tmp_path)
    run.write(1, ALONE, fill)
    verify = checkpoint.corruption
    steps = iter(range(2, 5))

    def verified(path: Path) -> str | None:
        if (step := next(steps, None)) is not None:  # the run writes another and deletes this one
            run.write(step, ALONE, fill)
            shutil.rmtree(path)
        return verify(path)

    monkeypatch.setattr(checkpoint, "corruption", verified)
    found = Checkpoints(tmp_path).newest_valid()
    assert found is not None and found.name == "step-00000004"
    assert not caplog.messages


def test_a_checkpoint_that_a_live_run_deletes_while_it_is_read_is_replaced_by_the_next(tmp_path: Path) -> None:
    run, read = Checkpoints(tmp_path), []
    run.write(1, ALONE, fill)

    def action(path: Path) -> int:
        read.append(path)
        if len(read) < 4:
            run.write(step_of(path) + 1, ALONE, fill)
            shutil.rmtree(path)
        return len(Saved(path, "model"))

    assert read_checkpoint(tmp_path, action) == 1
    assert [step_of(path) for path in read] == [1, 2, 3, 4]
    (tmp_path / "checkpoints" / "step-00000004" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid"):
        read_checkpoint(tmp_path, action)


def test_weights_that_are_not_floats_are_refused(tmp_path: Path) -> None:
    shapes = {"weight": torch.Size([2])}
    for value in (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)):
        save_file({"weight": value}, tmp_path / "model.safetensors")
        Saved(tmp_path, "model").check_network(shapes)
    for value in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.int64)):
        save_file({"weight": value}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"weight in .*model\.safetensors has type [CI]64; weights have"):
            Saved(tmp_path, "model").check_network(shapes)
