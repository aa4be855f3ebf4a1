"""`PerSampleState` agrees with a dictionary through any steps, snapshots, crashes and changes of the store."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch.utils.data import DataLoader, TensorDataset

from udddm import CheckpointError, ConfigError, CorruptChunkError, DataError, PerSampleState, StoreError
from udddm.cli.store import main as store_command
from udddm.config import OrderConfig, StoreConfig

TENSORS: dict[str, Any] = {
    "mean": ((3,), torch.float32),
    "image": ((2, 2), torch.float16),
    "visits": ((), torch.int64),
    "seen": ((), torch.bool),
}
KINDS = ["gpu", "pinned", "zarr"]
ORDER = OrderConfig(lanes=2, chunk=4, window=2)
SAMPLES, BATCH = 61, 8


def make(root: Path, kind: str = "zarr", **changes: Any) -> PerSampleState:
    arguments = {"samples": SAMPLES, "batch_size": BATCH, "order": ORDER, "store": kind, **changes}
    if arguments["store"] == "zarr":
        arguments.setdefault("url", root / "state")
    return PerSampleState(arguments.pop("tensors", TENSORS), **arguments)


def successors(ids: torch.Tensor, old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New tensors that depend on the sample and on what was read, so that a wrong row never goes unnoticed."""
    visits = old["visits"] + 1
    mean = old["mean"] * 0.5 + ids[:, None] + torch.arange(3)
    return {"mean": mean, "image": mean[:, :2, None].half().expand(-1, 2, 2), "visits": visits, "seen": visits > 0}


def contents(state: PerSampleState) -> dict[int, dict[str, Any]]:
    """Every sample's tensors as lists."""
    return {
        int(i): {name: values[row].tolist() for name, values in tensors.items()}
        for ids, tensors in state.chunks()
        for row, i in enumerate(ids)
    }


def train(state: PerSampleState, steps: int) -> None:
    for _ in range(steps):
        ids = state.ids
        state.write(**successors(ids, state.read()))


@pytest.fixture(params=KINDS)
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PerSampleState]:
    with make(tmp_path, request.param) as opened:
        yield opened


# The loop.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_visits_every_sample_once_per_epoch_and_reads_what_was_written(
    state: PerSampleState, workers: int
) -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(SAMPLES)),
        batch_sampler=state.batch_sampler,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,
    )
    for epoch in range(3):
        assert (state.epoch, state.step, len(loader)) == (epoch, 0, state.steps_per_epoch)
        seen = []
        for (ids,) in loader:
            old = state.read(ids)
            assert old["visits"].eq(epoch).all()
            assert old["seen"].eq(epoch > 0).all()
            state.write(**successors(ids, old))
            seen += ids.tolist()
        assert sorted(seen) == list(range(SAMPLES))
    found = contents(state)
    assert sorted(found) == list(range(SAMPLES))
    assert all(found[i]["mean"] == [1.75 * (i + j) for j in range(3)] for i in found)


def test_a_loop_that_was_left_continues_where_it_was(state: PerSampleState) -> None:
    loader = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_sampler=state.batch_sampler)
    seen = []
    for (ids,) in loader:
        state.write(**successors(ids, state.read(ids)))
        seen += ids.tolist()
        if state.step == 3:
            break
    assert len(loader) == state.steps_per_epoch - 3
    for (ids,) in loader:
        state.write(**successors(ids, state.read(ids)))
        seen += ids.tolist()
    assert sorted(seen) == list(range(SAMPLES))
    assert state.epoch == 1


def test_what_was_read_and_written_belongs_to_the_caller(state: PerSampleState) -> None:
    for _ in range(2 * state.steps_per_epoch):
        ids, old = state.ids, state.read()
        new = successors(ids, old)
        for values in old.values():
            values.zero_()
        state.write(**new)
        for name in ("mean", "visits"):
            new[name].fill_(9)
    assert all(found["mean"] == [1.5 * (i + j) for j in range(3)] for i, found in contents(state).items())


def test_write_without_arguments_changes_nothing(state: PerSampleState) -> None:
    train(state, state.steps_per_epoch)
    before = contents(state)
    for _ in range(state.steps_per_epoch):
        state.read()["mean"].fill_(5)
        state.write()
    assert contents(state) == before


def test_gradients_do_not_reach_the_state(state: PerSampleState) -> None:
    mean = torch.ones(len(state.ids), 3, requires_grad=True)
    state.read()
    state.write(mean=2 * mean)
    for _ in range(state.steps_per_epoch - 1):
        state.read()
        state.write()
    assert not state.read()["mean"].requires_grad


# Snapshots.


def machine(root: Path) -> type[RuleBasedStateMachine]:
    class StateMachine(RuleBasedStateMachine):
        """Steps, snapshots, and crashes after which another kind of store resumes, against a dictionary."""

        place: Path | None = None

        @initialize(kind=st.sampled_from(KINDS))
        def begin(self, kind: str) -> None:
            self.place = Path(tempfile.mkdtemp(dir=root))
            self.kept: dict[str, Any] = {}
            self.open(kind)

        def open(self, kind: str) -> None:
            assert self.place is not None
            self.state = make(self.place, kind)
            found = self.state.resume(self.place / "snapshots")
            if self.kept:
                assert found is not None
                assert json.loads((found / "loop.json").read_text()) == self.kept["position"]
                assert [self.state.epoch, self.state.step] == self.kept["position"]
                self.model = {i: dict(row) for i, row in self.kept["model"].items()}
            else:
                assert found is None
                zero = {"mean": [0.0] * 3, "image": [[0.0] * 2] * 2, "visits": 0, "seen": False}
                self.model = {i: dict(zero) for i in range(SAMPLES)}

        @rule(steps=st.integers(1, 12))
        def advance(self, steps: int) -> None:
            for _ in range(steps):
                ids, old = self.state.ids, self.state.read()
                for row, i in enumerate(ids.tolist()):
                    assert {name: values[row].tolist() for name, values in old.items()} == self.model[i]
                new = successors(ids, old)
                self.state.write(**new)
                for row, i in enumerate(ids.tolist()):
                    self.model[i] = {name: values[row].tolist() for name, values in new.items()}

        @rule()
        def check(self) -> None:
            assert contents(self.state) == self.model

        @rule()
        def save(self) -> None:
            assert self.place is not None
            position = [self.state.epoch, self.state.step]
            text = json.dumps(position)
            self.state.snapshot(self.place / "snapshots", lambda d: (d / "loop.json").write_text(text))
            self.kept = {"position": position, "model": {i: dict(row) for i, row in self.model.items()}}

        @rule(kind=st.sampled_from(KINDS))
        def crash(self, kind: str) -> None:
            self.state.close()
            self.open(kind)

        def teardown(self) -> None:
            if self.place is not None:
                self.state.close()
                shutil.rmtree(self.place)

    return StateMachine


def test_random_sequences_agree_with_a_dictionary(tmp_path: Path) -> None:
    run_state_machine_as_test(
        machine(tmp_path),
        settings=settings(
            max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_stays_valid_through_later_epochs(kind: str, tmp_path: Path) -> None:
    with make(tmp_path, kind) as state:
        train(state, state.steps_per_epoch + 3)
        older = state.snapshot(tmp_path / "run")
        before = contents(state)
        train(state, 3 * state.steps_per_epoch)
        newest = state.snapshot(tmp_path / "run")
        train(state, 3 * state.steps_per_epoch)
    shutil.rmtree(newest)
    for _ in range(2):
        with make(tmp_path, kind) as state:
            assert state.resume(tmp_path / "run") == older
            assert contents(state) == before
            train(state, 2 * state.steps_per_epoch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_that_fails_leaves_the_one_before(kind: str, tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "model.pt").write_bytes(b"half")
        raise ValueError("no model")

    with make(tmp_path, kind) as state:
        train(state, 5)
        first = state.snapshot(tmp_path / "run")
        before = contents(state)
        train(state, 9)
        with pytest.raises(CheckpointError, match=r"save\(\) failed with ValueError\('no model'\)"):
            state.snapshot(tmp_path / "run", fail)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [first.name]
        train(state, 3)
    with make(tmp_path, kind) as state:
        assert state.resume(tmp_path / "run") == first
        assert contents(state) == before


def test_all_but_the_newest_snapshots_are_removed_and_a_damaged_one_is_skipped(tmp_path: Path) -> None:
    with make(tmp_path) as state:
        for _ in range(4):
            train(state, 6)
            newest = state.snapshot(tmp_path / "run", keep=2)
        assert state.snapshot(tmp_path / "run") == newest
        kept = sorted(path.name for path in newest.parent.iterdir())
        assert kept == ["step-00000018", "step-00000024"]
    (newest / "state" / "snapshot.json").write_text("{}")
    with make(tmp_path) as state:
        assert state.resume(tmp_path / "run") == newest.with_name("step-00000018")
        assert state.epoch * state.steps_per_epoch + state.step == 18
    assert newest.with_name("step-00000024.damaged").exists()


def test_other_programs_read_the_array(tmp_path: Path) -> None:
    with make(tmp_path) as state:
        assert state.resume(tmp_path / "run") is None
        train(state, state.steps_per_epoch)
        state.snapshot(tmp_path / "run")
        wanted = contents(state)
        order = state.order
    record = json.loads((tmp_path / "run" / "per-sample.json").read_text())
    fields = [(name, each["dtype"], tuple(each["shape"])) for name, each in record["tensors"].items()]
    rows = zarr.open(tmp_path / "state")["gen-000001"][:].view(np.dtype(fields))[..., 0]
    for lane in range(order.num_lanes):
        for slot in range(order.lane_slots(lane)):
            sample = int(order.sample_of(np.array([order.lane_start(lane) + slot]))[0])
            assert rows[lane, slot]["mean"].tolist() == wanted[sample]["mean"]
            assert rows[lane, slot]["visits"] == wanted[sample]["visits"]
    assert store_command(["verify", str(tmp_path / "state")]) == 0
    assert store_command(["info", str(tmp_path / "state")]) == 0
    assert store_command(["convert", str(tmp_path / "state"), str(tmp_path / "copy")]) == 0


def test_a_custom_store_keeps_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    custom = StoreConfig(kind="custom_store:SqliteStore", url=str(tmp_path / "database"))
    with make(tmp_path, store=custom) as state, make(tmp_path, "gpu") as other:
        for each in (state, other):
            train(each, 2 * each.steps_per_epoch + 3)
        wanted = contents(other)
        assert contents(state) == wanted
        state.snapshot(tmp_path / "run")
    for kind in (custom, "gpu"):
        with make(tmp_path, store=kind) as state:
            state.resume(tmp_path / "run")
            assert contents(state) == wanted


# Mistakes.


def test_steps_out_of_order_are_refused(state: PerSampleState, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"write\(\) was called without read\(\) in step 0 of epoch 0"):
        state.write()
    state.read()
    with pytest.raises(StoreError, match=r"read\(\) was called twice in step 0 of epoch 0"):
        state.read()
    with pytest.raises(StoreError, match=r"snapshot\(\) was called between read\(\) and write\(\)"):
        state.snapshot(tmp_path / "run")
    with pytest.raises(DataError, match=re.escape("write(mean=...): the shape is [1, 3] instead of [8, 3]")):
        state.write(mean=torch.zeros(1, 3))
    state.write(mean=torch.zeros(8, 3))  # a refused write may be repeated
    with pytest.raises(StoreError, match=r"these are not the samples of step 1 of epoch 0"):
        state.read(torch.arange(BATCH))
    with pytest.raises(StoreError, match="before the first read"):
        state.resume(tmp_path / "run")
    state.close()
    with pytest.raises(StoreError, match="closed"):
        state.read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"samples": 60}, "samples is 61 there and 60 here"),
        ({"batch_size": 16}, "batch_size is 8 there and 16 here"),
        ({"order": OrderConfig(lanes=4, chunk=4, window=2)}, "order.lanes is 2 there and 4 here"),
        ({"tensors": {"mean": ((3,), torch.float32)}}, "tensors are {'mean': {'shape': [3]"),
    ],
)
def test_another_order_or_other_tensors_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with make(tmp_path) as state:
        state.resume(tmp_path / "run")
        train(state, 3)
        state.snapshot(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with make(tmp_path, **change) as state, pytest.raises(ConfigError, match=re.escape(message)):
        state.resume(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_in_use_and_a_store_of_another_state_are_refused(tmp_path: Path) -> None:
    with make(tmp_path) as first:
        first.resume(tmp_path / "run")
        train(first, 20)
        for run, message in (("run", "run is in use by another process"), ("other", "is being written by another run")):
            with make(tmp_path) as second, pytest.raises(StoreError, match=message):
                second.resume(tmp_path / run)
        train(first, 3)
        first.snapshot(tmp_path / "run")
        wanted = contents(first)
    for directory in (tmp_path / "other", None):
        with make(tmp_path) as second, pytest.raises(StoreError, match="holds the x0-state of another run"):
            second.read() if directory is None else second.resume(directory)
    with make(tmp_path) as again:
        again.resume(tmp_path / "run")
        assert contents(again) == wanted


def test_a_directory_with_the_snapshots_of_another_state_is_refused(tmp_path: Path) -> None:
    with make(tmp_path, "gpu") as first, make(tmp_path, "gpu") as second:
        first.snapshot(tmp_path / "run")
        second.read()
        second.write()
        with pytest.raises(StoreError, match="run is in use by another process"):
            second.snapshot(tmp_path / "run")
        with pytest.raises(ConfigError, match="this state has its snapshots in"):
            first.snapshot(tmp_path / "elsewhere")
        first.close()
        for _ in range(2):  # the failure releases the directory
            with pytest.raises(ConfigError, match=r"call resume\(\) with it before the first read\(\)"):
                second.snapshot(tmp_path / "run")


def test_a_worker_of_a_loader_does_not_keep_the_directory(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with make(tmp_path, "gpu") as state:
        state.resume(tmp_path / "run")
        with warnings.catch_warnings(action="ignore"):  # of forking with threads, from Python 3.12 on
            child = os.fork()
        if child == 0:
            os.write(writing, b".")  # it runs
            signal.pause()
        os.read(reading, 1)
    try:
        with make(tmp_path, "gpu") as state:
            state.resume(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": "ram"}, "store: unknown x0-state store 'ram'; the choices are none, gpu, pinned, zarr"),
        ({"store": "none"}, "store='none' keeps no state"),
        ({"store": "zarr", "url": None}, "url: zarr needs a location"),
        ({"store": "pinned", "url": "here"}, "url='here' has no effect with store='pinned'"),
        ({"store": StoreConfig(kind="gpu"), "url": "here"}, "url: give it in the StoreConfig"),
        ({"store": StoreConfig(kind="gpu", dtype="fp32")}, "store.dtype has no effect here"),
        ({"samples": 1}, "the data set has 1 samples, fewer than order.lanes=2"),
        ({"samples": 0}, "samples=0: it must be a positive integer"),
        ({"batch_size": 7}, "order.lanes=2 must divide"),
        ({"device": "abacus"}, "device='abacus'"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(tmp_path, **{"store": "gpu", **change})


def test_secrets_in_a_url_are_refused_and_not_shown(tmp_path: Path) -> None:
    with make(tmp_path, url="s3://key:hunter2@bucket/state") as state, pytest.raises(StoreError) as caught:
        state.resume(tmp_path / "run")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json"))


@pytest.mark.parametrize("name", ["model/weights.pt", "manifest.json", ".hidden"])
def test_save_may_only_write_files_that_a_snapshot_can_hold(name: str, tmp_path: Path) -> None:
    def save(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")

    with make(tmp_path, "gpu") as state, pytest.raises(CheckpointError, match=f"wrote {name.partition('/')[0]}"):
        state.snapshot(tmp_path / "run", save)


def test_a_corrupt_chunk_is_named_or_its_samples_become_zeros(tmp_path: Path) -> None:
    url = str(tmp_path / "state")
    with make(tmp_path) as state:
        state.resume(tmp_path / "run")
        train(state, state.steps_per_epoch)
        state.snapshot(tmp_path / "run")
        chunk = set(next(iter(state.chunks()))[0].tolist())
        wanted = contents(state)
    file = tmp_path / "state" / "gen-000001" / "c" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-5] + b"12345")
    with make(tmp_path) as state, pytest.raises(CorruptChunkError, match=r"generation 1, lane 0, chunk 0 is damaged"):
        state.resume(tmp_path / "run")
        train(state, state.steps_per_epoch)
    with make(tmp_path, store=StoreConfig(kind="zarr", url=url, on_corruption="reinitialize")) as state:
        state.resume(tmp_path / "run")
        found = contents(state)
    assert {i for i in found if found[i] != wanted[i]} == chunk
    assert all(found[i]["visits"] == 0 for i in chunk)
