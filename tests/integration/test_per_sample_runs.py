"""Loops on `PerSampleState` that are killed at random instants, have several ranks, or keep their state on S3."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from udddm import ConfigError, PerSampleState, StoreError
from udddm.backends.distributed.ranks import Ranks
from udddm.config import OrderConfig
from udddm.testing.ranks import on_ranks
from udddm.testing.s3 import BUCKET, S3Server

SAMPLES, BATCH = 127, 8
TENSORS: dict[str, Any] = {"mean": ((4,), torch.float32), "visits": ((), torch.int32)}


def rows_of(state: PerSampleState) -> dict[int, list[Any]]:
    """The tensors of every sample of this rank, as lists."""
    return {
        int(i): [tensors["mean"][row].tolist(), int(tensors["visits"][row])]
        for ids, tensors in state.chunks()
        for row, i in enumerate(ids)
    }


@dataclass
class Loop:
    """Trains a linear model on random inputs toward its own average prediction of each sample.

    The weights depend on the state and the state on the weights, so one wrong row changes everything after it.
    """

    root: Path
    store: str
    url: str | None
    epochs: int
    pause: float = 0.0
    every: int = 6
    """Steps between snapshots."""
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    """The variables of the test; a process of the fork server has those of the server's start."""

    def state(self) -> PerSampleState:
        order = OrderConfig(lanes=4, chunk=8, window=2)
        return PerSampleState(
            TENSORS, samples=SAMPLES, batch_size=BATCH, store=self.store, url=self.url, order=order, seed=3
        )

    def __call__(self, started: Event | None = None) -> None:
        os.environ.update(self.environment)
        torch.set_num_threads(1)
        inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
        model = torch.nn.Linear(4, 4)
        torch.nn.init.eye_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if started is not None:
            started.set()
        with self.state() as state:
            if (found := state.resume(self.root / "run")) is not None:
                saved = torch.load(found / "model.pt", weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])

            def save(directory: Path) -> None:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, directory / "model.pt")

            loader = DataLoader(TensorDataset(torch.arange(SAMPLES), inputs), batch_sampler=state.batch_sampler)
            while state.epoch < self.epochs:
                for ids, x in loader:
                    self.step(state, model, optimizer, ids, x)
                    if state.step % self.every == 0:
                        state.snapshot(self.root / "run", save)
            state.snapshot(self.root / "run", save)

    def step(
        self, state: PerSampleState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: Any, x: Any
    ) -> None:
        old = state.read(ids)
        predicted = model(x)
        loss = (predicted - 0.9 * old["mean"] - 0.1 * x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state.write(mean=0.6 * old["mean"] + 0.4 * predicted, visits=old["visits"] + 1)
        time.sleep(self.pause)

    def result(self) -> tuple[dict[int, list[Any]], dict[str, torch.Tensor]]:
        """Every sample's tensors and the weights at the end."""
        with self.state() as state:
            found = state.resume(self.root / "run")
            assert found is not None
            assert (state.epoch, state.step) == (self.epochs, 0)
            return rows_of(state), torch.load(found / "model.pt", weights_only=True)["model"]


def run_and_kill(loop: Loop, delays: list[float]) -> None:
    """Kill the loop that many seconds after its start, starting it again each time, then let it finish."""
    context = multiprocessing.get_context("forkserver")
    for delay in [*delays, None]:
        started = context.Event()
        process = context.Process(target=loop, args=(started,))
        process.start()
        assert started.wait(60)
        if delay is not None:
            time.sleep(delay)
            assert process.is_alive(), "every kill hits a running loop"
            process.kill()
        process.join(200)
        assert process.exitcode == (0 if delay is None else -9)


@pytest.mark.parametrize(
    ("store", "kills"),
    [
        ("zarr", 3),
        ("pinned", 2),
        *(pytest.param(store, 20, marks=pytest.mark.slow) for store in ("gpu", "pinned", "zarr")),
    ],
)
def test_a_loop_killed_at_random_instants_ends_as_an_undisturbed_one(store: str, kills: int, tmp_path: Path) -> None:
    check_kills(tmp_path, store, kills, [str(tmp_path / name) if store == "zarr" else None for name in "ab"])


@pytest.mark.slow
def test_a_loop_killed_on_s3_ends_as_an_undisturbed_one(s3: S3Server, tmp_path: Path) -> None:
    check_kills(tmp_path, "zarr", 20, [f"s3://{BUCKET}/{uuid.uuid4().hex}/{name}" for name in "ab"])


def check_kills(root: Path, store: str, kills: int, urls: list[Any]) -> None:
    chance, pause = random.Random(kills), 0.01
    delays = [chance.uniform(0, 0.5) for _ in range(kills)]
    epochs = 2 + int(sum(delays) / (pause * 16))  # the pauses of 16 steps each: no loop finishes before its kill
    undisturbed = Loop(root / "undisturbed", store, urls[0], epochs, every=1000)
    undisturbed()
    killed = Loop(root / "killed", store, urls[1], epochs, pause)
    run_and_kill(killed, delays)
    wanted, found = undisturbed.result(), killed.result()
    assert found[0] == wanted[0]
    assert all(row[1] == epochs for row in found[0].values())
    assert all(found[1][name].equal(wanted[1][name]) for name in wanted[1])


@dataclass
class RankedLoop(Loop):
    """The state of each rank after some epochs, in a file of that rank. Nothing depends on the number of ranks."""

    def __call__(self, ranks: Any = None) -> None:
        assert isinstance(ranks, Ranks)
        if ranks.world_size == 2:
            self.check_refusal()
        total = 0
        with self.state() as state:
            state.resume(self.root / "run")
            epochs = state.epoch + self.epochs
            while state.epoch < epochs:
                for ids in state.batch_sampler:
                    numbers = torch.tensor(ids)
                    total += state.total
                    old = state.read(numbers)
                    mean = 0.5 * old["mean"] + numbers[:, None]
                    state.write(mean=mean, visits=old["visits"] + 1)
                    if state.step == 5:
                        state.snapshot(self.root / "run", lambda d: (d / "by.txt").write_text(f"{ranks.rank}"))
            found = state.snapshot(self.root / "run")
            rows = rows_of(state)
        if ranks.world_size > 1:
            counts = torch.tensor([len(rows)])
            dist.all_reduce(counts)
            assert int(counts) == SAMPLES
        assert total == self.epochs * SAMPLES
        assert found.exists()
        (self.root / f"rank-{ranks.rank}-of-{ranks.world_size}.json").write_text(json.dumps(rows))

    def check_refusal(self) -> None:
        """Of lanes with 9 and 8 samples, the second has none left in the second step of 8 each."""
        with pytest.raises(ConfigError, match="leave rank 1 without any in the last of 2 steps"):
            PerSampleState(TENSORS, samples=17, batch_size=16, order=OrderConfig(lanes=2))


@pytest.mark.parametrize("store", ["pinned", "zarr"])
def test_any_number_of_ranks_gives_the_same_state(store: str, tmp_path: Path) -> None:
    loop = RankedLoop(tmp_path, store, str(tmp_path / "state") if store == "zarr" else None, epochs=2)
    visits = 0
    for world in (2, 1, 4):
        if world == 1:
            loop(Ranks(0, 1, torch.device("cpu")))
        else:
            on_ranks(world, tmp_path, loop)
        visits += loop.epochs
        parts = [json.loads((tmp_path / f"rank-{r}-of-{world}.json").read_text()) for r in range(world)]
        assert sum(len(part) for part in parts) == SAMPLES
        for i, (mean, count) in ((int(i), row) for part in parts for i, row in part.items()):
            assert count == visits
            assert mean == [i * (2 - 0.5 ** (visits - 1))] * 4


def test_a_store_on_s3_is_that_of_a_disk_and_has_one_user(s3: S3Server, tmp_path: Path) -> None:
    loops = [Loop(tmp_path / "disk", "zarr", str(tmp_path / "state"), 2)]
    loops.append(Loop(tmp_path / "s3", "zarr", f"s3://{BUCKET}/{uuid.uuid4().hex}", 2))
    for loop in loops:
        loop()
    (disk, weights), (cloud, others) = (loop.result() for loop in loops)
    assert cloud == disk
    assert all(weights[name].equal(others[name]) for name in weights)


def hold(loop: Loop, ready: Event, done: Event) -> None:
    with loop.state() as state:
        state.resume(loop.root / "run")
        ready.set()
        done.wait(60)


def test_a_second_process_on_the_same_store_is_refused_at_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path, "zarr", str(tmp_path / "state"), 1)
    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(loop, ready, done))
    process.start()
    assert ready.wait(60)
    with loop.state() as state, pytest.raises(StoreError, match=f"being written by another run.*process {process.pid}"):
        state.resume(tmp_path / "other")
    with loop.state() as state, pytest.raises(StoreError, match="run is in use by another process"):
        state.resume(tmp_path / "run")
    done.set()
    process.join(60)
    assert process.exitcode == 0
    loop()
    assert all(row[1] == 1 for row in loop.result()[0].values())


# The example.

EXAMPLE = Path(__file__).parents[2] / "examples" / "per_sample" / "temporal_ensembling.py"


def ensembled(root: Path, *options: str) -> str:
    """Run the example in a new process. Returns the accuracy that it prints."""
    command = [sys.executable, str(EXAMPLE), "--run", str(root / "run"), "--epochs", "4", "--every", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_example_is_a_short_loop_that_continues_with_the_same_result(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 120
    options = ["--store", "zarr", "--url", str(tmp_path / "state")]
    accuracy = ensembled(tmp_path, *options)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    weights = torch.load(newest / "loop.pt", weights_only=True)["model"]
    shutil.rmtree(newest)
    assert ensembled(tmp_path, *options) == accuracy
    again = torch.load(newest / "loop.pt", weights_only=True)["model"]
    assert all(again[name].equal(weights[name]) for name in weights)
