"""The conformance suite of the x0-state store: subclass it, create your store in `make`, and pytest runs all tests.

class TestMyStore(StoreConformance):
    def make(self, order, lanes, shape, encoding, directory):
        return MyStore(order, lanes, shape, encoding, directory / "state")

The stores of a run's ranks are stepped in turn and compared with a model, a dictionary from sample to stored value.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from udddm.order import Order
from udddm.store import Encoding, Snapshot, X0Store
from udddm.store.encoding import Rows, StateDtype, generation_zero

SHAPE = (2, 2, 3)
Make = Callable[[Order, range, tuple[int, ...], Encoding, Path], X0Store]


@dataclass
class Saved:
    """A snapshot, and the model's content when it was taken."""

    directory: Path
    epoch: int
    step: int
    model: dict[int, Rows]


class ModelledRun:
    """The stores of `world` ranks in lockstep, and the dictionary {sample: stored value} that they must agree with.

    Files are below `directory`: snapshots, and `directory / "state"` for a store that keeps generations outside them.
    `make` may be replaced between two starts.
    """

    def __init__(self, make: Make, order: Order, encoding: Encoding, directory: Path, shape: tuple[int, ...] = SHAPE):
        self.make, self.order, self.encoding, self.directory, self.shape = make, order, encoding, directory, shape
        self.stores: list[X0Store] = []
        self.kept: list[Saved] = []
        self.model: dict[int, Rows] = {}
        self.epoch = self.step = 0
        self._serial = itertools.count()

    def start(self, world: int = 1, saved: Saved | None = None) -> None:
        """Open at the beginning, or at the position of a snapshot."""
        samples = np.arange(self.order.samples)
        if saved is None:
            zero = self.encoding.to_array(generation_zero(self.order.seed, samples, self.shape, self.encoding))
            self.epoch, self.step, self.model = 0, 0, {int(i): zero[i].copy() for i in samples}
        else:
            self.epoch, self.step, self.model = saved.epoch, saved.step, dict(saved.model)
        self.stores = []
        for rank in range(world):
            lanes = self.order.lanes_of(rank, world)
            store = self.make(self.order, lanes, self.shape, self.encoding, self.directory)
            self.stores.append(store)
            self._retain(store)
            source = None if saved is None else Snapshot(saved.directory, self.directory / "state", store.repair)
            store.start(self.epoch, self.step, source)

    def advance(self, steps: int = 1) -> None:
        """Take steps: every read must return the model's values, and every write changes them."""
        for _ in range(steps):
            for store in self.stores:
                assert (store.epoch, store.step) == (self.epoch, self.step)
                self._check_read(store, store.read())
            for store in self.stores:
                self._write(store)
            self.step += 1
            if self.step == self.order.steps_per_epoch:
                self.epoch, self.step = self.epoch + 1, 0

    def _check_read(self, store: X0Store, state: torch.Tensor) -> None:
        batch = self.order.batch_of(store.lanes, self.epoch, self.step)
        assert state.shape == (len(batch.ids), *self.shape)
        assert state.dtype == torch.float32
        assert state.device.type == store.device.type
        assert bool(torch.isfinite(state).all()), "padding must be finite"
        real = np.flatnonzero(batch.weights)
        if len(real):
            rows = np.stack([self.model[int(i)] for i in batch.ids[real]])
            wanted = self.encoding.decode(self.encoding.to_tensor(rows))
            torch.testing.assert_close(state.cpu()[real], wanted, rtol=0, atol=0)
        state.fill_(-3)  # the caller may modify what it read

    def _write(self, store: X0Store) -> None:
        batch = self.order.batch_of(store.lanes, self.epoch, self.step)
        random = np.random.default_rng((self.order.seed, self.epoch, self.step, store.lanes.start))
        scale = 1e5 if random.integers(8) == 0 else 1  # sometimes out of range for float16
        values = torch.from_numpy(random.normal(0, scale, (len(batch.ids), *self.shape)).astype(np.float32))
        real = np.flatnonzero(batch.weights)
        stored = self.encoding.to_array(self.encoding.encode(values)).copy()
        values[np.flatnonzero(batch.weights == 0)] = float("nan")  # padding is never written
        given = values.to(store.device)
        store.write(given)
        given.fill_(7)  # the caller may modify its tensor after the write
        self.model.update((int(batch.ids[i]), stored[i]) for i in real)

    def save(self, keep: int = 2) -> Saved:
        """Snapshot all ranks into one directory, and drop all but the newest `keep` snapshots."""
        directory = self.directory / f"snapshot-{next(self._serial)}"
        for store in self.stores:
            store.snapshot(directory)
        saved = Saved(directory, self.epoch, self.step, dict(self.model))
        self.kept.append(saved)
        for old in self.kept[:-keep]:
            shutil.rmtree(old.directory)
        del self.kept[:-keep]
        for store in self.stores:
            self._retain(store)
        return saved

    def _retain(self, store: X0Store) -> None:
        epochs = {saved.epoch for saved in self.kept}
        store.retain(epochs | {epoch + 1 for epoch in epochs})

    def crash(self) -> None:
        """Drop the stores in their current state: `close` must not save anything that a snapshot lacks."""
        for store in self.stores:
            store.close()
        self.stores = []

    def restart(self, saved: Saved | None, world: int = 1) -> None:
        """Crash, and start from a retained snapshot; newer ones are dropped."""
        self.crash()
        self.start(world, saved)
        later = self.kept[self.kept.index(saved) + 1 :] if saved is not None else list(self.kept)
        for gone in later:
            shutil.rmtree(gone.directory)
            self.kept.remove(gone)

    def check_rows(self) -> None:
        """Check chunk by chunk that the stores agree with the model."""
        for store in self.stores:
            digest = hashlib.sha256()
            for lane in store.lanes:
                for chunk in range(self.order.num_chunks(lane)):
                    wanted = np.stack([self.model[int(i)] for i in self.order.chunk_samples(lane, chunk)])
                    np.testing.assert_array_equal(store.rows(lane, chunk), wanted)
                    digest.update(wanted.tobytes())
            assert store.sha256() == digest.hexdigest()


ORDERS: dict[str, Order] = {
    "even": Order(seed=1, samples=64, batch_size=8, num_lanes=2, chunk_size=4, chunks_per_window=2),
    "short last chunk and padded last step": Order(
        seed=2, samples=61, batch_size=8, num_lanes=4, chunk_size=5, chunks_per_window=2
    ),
    "uneven lanes": Order(seed=3, samples=23, batch_size=6, num_lanes=3, chunk_size=2, chunks_per_window=3),
    "a step of several windows": Order(
        seed=4, samples=53, batch_size=22, num_lanes=2, chunk_size=2, chunks_per_window=1
    ),
    "one window per lane": Order(seed=5, samples=30, batch_size=4, num_lanes=2, chunk_size=4, chunks_per_window=8),
    "one step per epoch": Order(seed=6, samples=12, batch_size=12, num_lanes=4, chunk_size=1, chunks_per_window=1),
    "one sample per lane": Order(seed=7, samples=2, batch_size=2, num_lanes=2, chunk_size=1, chunks_per_window=1),
}


class StoreConformance(ABC):
    """The tests that every x0-state store must pass, for each of `dtypes`, with `examples` state machine runs each."""

    dtypes: ClassVar[tuple[StateDtype, ...]] = ("fp32", "fp16", "bf16", "uint8")
    examples: ClassVar[int] = 15

    @abstractmethod
    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        """Create a store, not started, for the lanes of one rank.

        Anything that outlives it and is not in a snapshot must be in `directory / "state"`, which all ranks share.
        """

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        """An empty directory for this test."""
        return tmp_path

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)
        if "order" in metafunc.fixturenames:
            metafunc.parametrize("order", list(ORDERS.values()), ids=list(ORDERS))

    @pytest.fixture
    def run(self, order: Order, dtype: StateDtype, directory: Path) -> ModelledRun:
        return ModelledRun(self.make, order, Encoding(dtype), directory)

    def test_epochs_read_what_the_epoch_before_wrote(self, run: ModelledRun) -> None:
        run.start()
        try:
            run.advance(3 * run.order.steps_per_epoch)
            run.check_rows()
        finally:
            run.crash()

    def test_any_number_of_ranks_holds_the_same_state(self, run: ModelledRun) -> None:
        run.start(run.order.num_lanes)
        try:
            run.advance(run.order.steps_per_epoch + max(1, run.order.steps_per_epoch // 2))
            run.check_rows()
        finally:
            run.crash()

    def test_snapshots_of_every_step_restore_into_any_number_of_ranks(self, run: ModelledRun) -> None:
        worlds = [w for w in range(1, run.order.num_lanes + 1) if run.order.num_lanes % w == 0]
        run.start()
        try:
            for i in range(2 * run.order.steps_per_epoch + 1):
                run.check_rows()
                run.restart(run.save(), worlds[i % len(worlds)])
                run.check_rows()
                run.advance()
        finally:
            run.crash()

    def test_a_snapshot_stays_valid_after_further_steps(self, run: ModelledRun) -> None:
        run.start()
        try:
            run.advance(run.order.steps_per_epoch // 2)
            first = run.save()
            run.advance(run.order.steps_per_epoch + 1)
            second = run.save()
            run.advance(2 * run.order.steps_per_epoch)
            run.restart(second)
            run.check_rows()
            run.advance(2 * run.order.steps_per_epoch)
            run.restart(first)
            run.check_rows()
            run.advance(run.order.steps_per_epoch)
        finally:
            run.crash()

    def test_closing_twice_and_early_is_harmless(self, directory: Path) -> None:
        run = ModelledRun(self.make, ORDERS["even"], Encoding(self.dtypes[0]), directory)
        run.start()
        stores = list(run.stores)
        run.crash()
        for store in stores:
            store.close()

    def test_random_sequences_agree_with_the_model(self, dtype: StateDtype, directory: Path) -> None:
        machine = _machine(self.make, Encoding(dtype), directory)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=15,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def _machine(make: Make, encoding: Encoding, root: Path) -> type[RuleBasedStateMachine]:
    class StoreMachine(RuleBasedStateMachine):
        """Steps, snapshots, crashes, and restores into a different number of ranks, in any sequence."""

        run: ModelledRun | None = None

        @initialize(
            seed=st.integers(0, 2**32),
            lanes=st.sampled_from([1, 2, 3, 4, 6]),
            more=st.integers(0, 60),
            share=st.integers(1, 9),
            chunk=st.integers(1, 9),
            window=st.integers(1, 4),
        )
        def begin(self, seed: int, lanes: int, more: int, share: int, chunk: int, window: int) -> None:
            order = Order(seed, lanes + more, share * lanes, lanes, chunk, window)
            self.run = ModelledRun(make, order, encoding, Path(tempfile.mkdtemp(dir=root)))
            self.run.start()

        @rule(steps=st.integers(1, 8))
        def advance(self, steps: int) -> None:
            assert self.run is not None
            self.run.advance(steps)

        @rule()
        def finish_the_epoch(self) -> None:
            assert self.run is not None
            self.run.advance(self.run.order.steps_per_epoch - self.run.step)

        @rule()
        def save(self) -> None:
            assert self.run is not None
            self.run.save()

        @rule(back=st.integers(1, 2), world=st.sampled_from([1, 2, 3, 4, 6]))
        def crash(self, back: int, world: int) -> None:
            assert self.run is not None
            fitting = world if self.run.order.num_lanes % world == 0 else 1
            saved = self.run.kept[-min(back, len(self.run.kept))] if self.run.kept else None
            self.run.restart(saved, fitting)

        @rule()
        def check_rows(self) -> None:
            assert self.run is not None
            self.run.check_rows()

        @invariant()
        def positions_agree(self) -> None:
            if self.run is not None:
                position = (self.run.epoch, self.run.step)
                assert all((store.epoch, store.step) == position for store in self.run.stores)

        def teardown(self) -> None:
            if self.run is not None:
                self.run.crash()
                shutil.rmtree(self.run.directory)

    return StoreMachine
