"""`PerSampleState`: the stores of this package in any PyTorch loop, without the trainer (docs/per-sample.md)."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch.utils.data import Sampler

from udddm import store as stores
from udddm.config import OrderConfig, StoreConfig
from udddm.errors import CheckpointError, ConfigError, StoreError
from udddm.files import expanded
from udddm.log import log
from udddm.order import Batch, Order
from udddm.runs import manifest
from udddm.runs.checkpoint import Checkpoints, step_of
from udddm.runs.per_sample.checks import RECORD, current_ranks, recorded_id, sole_user, store_config
from udddm.storage import local_path
from udddm.store import Encoding, Snapshot, StateLayout, StoreContext, StoreCounters, X0Store
from udddm.store.packing import Packing, Spec
from udddm.store.zarr import ZarrStore

_FAILURES = (ConfigError, CheckpointError, StoreError, OSError)


class StateBatchSampler(Sampler[list[int]]):
    """The sample numbers of this rank's steps, for `DataLoader(batch_sampler=...)`.

    An iterator begins at the state's position at the time of its creation and ends with the epoch. A loop that was
    resumed or left within an epoch therefore continues where it was. `len` is the number of the steps that are left.
    """

    def __init__(self, state: PerSampleState):
        self._state = state

    def __len__(self) -> int:
        return self._state.steps_per_epoch - self._state.step

    def __iter__(self) -> Iterator[list[int]]:
        return self._state._ids_from(self._state.epoch, self._state.step)


class PerSampleState:
    """Tensors of every sample of a data set, which a training loop reads and replaces once per epoch.

        state = udddm.PerSampleState({"mean": ((10,), torch.float32)}, samples=len(data), batch_size=64)
        loader = DataLoader(data, batch_sampler=state.batch_sampler)
        for _ in range(epochs):
            for images, labels in loader:
                mean = state.read()["mean"]              # [b, 10], of the samples of this batch
                ...
                state.write(mean=0.9 * mean + 0.1 * predictions)

    The rows of coming steps are read in the background, and those of past steps written behind the loop. All tensors
    are zeros until their first `write`. Used by one thread. With torch.distributed, create one on every rank after
    `init_process_group`; `resume`, the first `read` and `snapshot` are collective.

    Args:
        tensors: The shape and dtype of one sample's tensors, by name; the shape of a scalar is ().
        samples: The number of samples of the data set, numbered from 0 (N).
        batch_size: Samples per step over all ranks (B). The last batches of an epoch may be smaller.
        store: `gpu` (memory of `device`), `pinned` (host memory) or `zarr` (files or objects at `url`); or a
            StoreConfig for all settings. `dtype` may not be set there, because each tensor has its own.
        url: The location of a `zarr` store: a local path, s3://bucket/prefix, or any fsspec URL.
        order: Lanes, chunk and window, which determine the order (docs/architecture.md). By default there are as many
            lanes as possible that divide 8 and the batch size. The number of ranks must divide the lanes.
        seed: The seed of the order.
        device: Where `read` returns the tensors and `write` expects them.

    Raises ConfigError.
    """

    def __init__(
        self,
        tensors: Mapping[str, Spec],
        *,
        samples: int,
        batch_size: int,
        store: str | StoreConfig = "pinned",
        url: str | Path | None = None,
        order: OrderConfig | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self._packing = Packing(tensors)
        self._config = store_config(store, url)
        self._ranks = current_ranks(device)
        for name, value in (("samples", samples), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: it must be a positive integer")
        shape = (self._packing.row_bytes,)
        halves = (-(-self._packing.row_bytes // 2),)  # `Order.build` counts numbers of two bytes
        chosen = order or OrderConfig(lanes=math.gcd(8, batch_size))
        self.order = Order.build(chosen, seed, samples, batch_size, halves)
        """Which sample is in which slot, and visited when."""
        lanes = self.order.lanes_of(self._ranks.rank, self._ranks.world_size)
        self._layout = StateLayout(self.order, lanes, shape, Encoding("bytes"), self._ranks.device)
        self._check_last_step()
        self.batch_sampler = StateBatchSampler(self)
        """The batches of this rank, for a DataLoader."""
        self._store: X0Store | None = None
        self._directory: Path | None = None
        self._held = ExitStack()  # of the lock of the directory
        self._id = ""
        self._epoch = self._step = 0
        self._before: torch.Tensor | None = None  # the rows [b, row_bytes] that `read` returned, until `write`
        self._closed = False

    def _check_last_step(self) -> None:
        """Raise ConfigError on every rank if one of them would have no sample in the last step of an epoch."""
        order, world = self.order, self._ranks.world_size
        last = order.lanes_of(world - 1, world)  # lanes become shorter
        if not order.batch_of(last, 0, self.steps_per_epoch - 1).weights.any():
            raise ConfigError(
                f"batch_size={order.batch_size}: {order.samples} samples leave rank {world - 1} without any in "
                f"the last of {self.steps_per_epoch} steps; choose another batch_size, or leave some samples out"
            )

    # Position and order.

    @property
    def epoch(self) -> int:
        """The current epoch, from 0. In epoch 0 `read` returns zeros."""
        return self._epoch

    @property
    def step(self) -> int:
        """The next step in the epoch, from 0."""
        return self._step

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of every epoch, the same on all ranks."""
        return self.order.steps_per_epoch

    @property
    def ids(self) -> torch.Tensor:
        """The numbers [b] int64 of this rank's samples of the current step, on the CPU."""
        batch = self._batch(self._epoch, self._step)
        return torch.from_numpy(batch.ids[batch.weights > 0])

    @property
    def total(self) -> int:
        """The number of samples of the current step over all ranks.

        Ranks may have different numbers of samples in the last steps of an epoch. With DDP, which averages over the
        ranks, the gradient of the mean loss is that of `losses.sum() * world_size / state.total`.
        """
        return self._batch(self._epoch, self._step).total

    @property
    def counters(self) -> StoreCounters:
        """Seconds of waiting, bytes and retries since the store was opened."""
        return StoreCounters() if self._store is None else self._store.counters

    def _batch(self, epoch: int, step: int) -> Batch:
        return self.order.batch_of(self._layout.lanes, epoch, step)

    def _ids_from(self, epoch: int, step: int) -> Iterator[list[int]]:
        for each in range(step, self.steps_per_epoch):
            batch = self._batch(epoch, each)
            yield batch.ids[batch.weights > 0].tolist()

    # The training loop.

    def read(self, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tensors [b, *shape] of this rank's samples of the current step, as the caller's own copies.

        `ids` [b], if given, are the numbers of the samples that the loop has loaded, which are compared.

        Raises StoreError for a second `read` without `write`, for other samples than those of the step, and for a
        failure of the store, also in the background.
        """
        store = self._opened()
        if self._before is not None:
            raise StoreError(
                f"read() was called twice in step {self._step} of epoch {self._epoch}: call write() after every "
                "read(); without arguments it changes nothing"
            )
        if ids is not None and not torch.equal(ids.cpu(), self.ids):
            raise StoreError(
                f"read(ids): these are not the samples of step {self._step} of epoch {self._epoch}. Load them with "
                "DataLoader(data, batch_sampler=state.batch_sampler), and read and write once per batch"
            )
        rows = store.read()
        real = self._real()
        self._before = rows if real is None else rows.index_select(0, real)
        return self._packing.unpack(self._before)

    def write(self, **tensors: torch.Tensor) -> None:
        """Replace the tensors [b, *shape] of the samples that `read` returned, and move to the next step.

        A tensor that is not given keeps its value. Floating-point types are converted to the declared one, for float16
        after clamping to its range. Returns at once; the caller may modify the tensors afterward.

        Raises StoreError without a `read` before, and for a failure of the store; DataError, which names the tensor,
        for another name, shape, device or dtype. After a DataError `write` may be called again.
        """
        if self._before is None:
            raise StoreError(
                f"write() was called without read() in step {self._step} of epoch {self._epoch}: every step "
                "reads, then writes"
            )
        store, real = self._opened(), self._real()
        with torch.no_grad():
            rows = self._packing.pack(tensors, self._before)
            if real is not None:
                rows = rows.new_zeros(self._layout.step_samples, rows.shape[1]).index_copy_(0, real, rows)
        store.write(rows)
        self._before = None
        self._epoch, self._step = store.epoch, store.step

    def _real(self) -> torch.Tensor | None:
        """The rows of the step's batch that are samples, on the device; None if all are."""
        weights = self._batch(self._epoch, self._step).weights
        return None if weights.all() else torch.from_numpy(np.flatnonzero(weights)).to(self._layout.device)

    def chunks(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """The current state of all samples of this rank, between two steps: numbers [n] and tensors [n, *shape].

        They are on the CPU, one chunk at a time, for export or evaluation. Raises StoreError.
        """
        store = self._opened()
        self._check_between_steps("chunks()")
        for lane, chunk in self._layout.chunks():
            rows = store.encoding.to_tensor(store.rows(lane, chunk))
            yield torch.from_numpy(self.order.chunk_samples(lane, chunk)), self._packing.unpack(rows)

    # Snapshots.

    def resume(self, path: str | Path) -> Path | None:
        """Return to the newest valid snapshot in the directory `path`, which need not exist. Call it first of all.

        Returns the directory of the snapshot with the files that `save` wrote; None if there is no snapshot, and the
        state begins with zeros. The store may be another one than that of the snapshot; the tensors, samples,
        batch_size, order and seed may not.

        Raises ConfigError, which names the differing arguments; CheckpointError if there are snapshots and none is
        valid; StoreError if `path` or the store is in use by another process, belongs to another state, or is damaged.
        """
        if self._store is not None:
            raise StoreError("resume() was called after the state was opened; call it before the first read()")
        directory = expanded(path)
        self._id = self._record_in(directory)
        return self._open(Checkpoints(directory))

    def snapshot(self, path: str | Path, save: Callable[[Path], object] | None = None, keep: int = 2) -> Path:
        """Save this position in the directory `path`, between two steps, durably and completely or not at all.

        `save(directory)`, called on rank 0, adds what else the loop needs to resume, such as the model and optimizer:
        files directly in that directory. All but the newest `keep` snapshots are removed. A position has one snapshot;
        if it exists already, nothing is written.

        Returns the directory of the snapshot, `path`/checkpoints/step-<steps>. Raises StoreError between `read` and
        `write`, ConfigError if `path` has the snapshots of another state, and CheckpointError if writing fails.
        """
        if keep < 1:
            raise ConfigError(f"keep={keep}: at least one snapshot is kept")
        store, directory = self._opened(), expanded(path)
        self._check_between_steps("snapshot()")
        if self._directory is None:
            self._record_in(directory)
        if directory != self._directory:
            raise ConfigError(f"snapshot({str(path)!r}): this state has its snapshots in {self._directory}")
        checkpoints, step = Checkpoints(directory), self._epoch * self.steps_per_epoch + self._step

        def newest() -> bool:
            return any(step_of(each) == step for each in checkpoints.all())

        if self._ranks.run_on_rank_zero(newest, _FAILURES):
            return checkpoints.directory / f"step-{step:08d}"

        def kept() -> list[int]:
            checkpoints.prune(keep)
            return [step_of(each) for each in checkpoints.all()]

        written = checkpoints.write(step, self._ranks, lambda place: self._fill(store, place, save))
        self._retain(store, self._ranks.run_on_rank_zero(kept, _FAILURES))
        return written

    def _fill(self, store: X0Store, place: Path, save: Callable[[Path], object] | None) -> None:
        store.snapshot(place / "state")
        if save is None or not self._ranks.is_rank_zero:
            return
        try:
            save(place)
        except Exception as error:
            raise StoreError(f"save() failed with {error!r}") from error
        for file in sorted(p for p in place.iterdir() if p.name != "state"):
            if not file.is_file() or file.is_symlink() or not manifest.allowed(file.name):
                raise StoreError(
                    f"save() wrote {file.name}: write plain files directly in the directory, with names of letters, "
                    f"digits, '_', '-' and '.', other than {manifest.MANIFEST}"
                )

    def _record_in(self, directory: Path) -> str:
        """Use a directory for the snapshots. Returns the id of the state. Collective."""

        def record() -> str:
            with ExitStack() as held:
                held.enter_context(sole_user(directory))
                found = recorded_id(directory, self._packing, self.order, self._id)
                self._held = held.pop_all()
            return found

        found = self._ranks.run_on_rank_zero(record, _FAILURES)
        self._directory = directory
        return found

    def _check_between_steps(self, what: str) -> None:
        if self._before is not None:
            raise StoreError(
                f"{what} was called between read() and write() of step {self._step}; call it after write()"
            )

    # The store.

    def _opened(self) -> X0Store:
        if self._closed:
            raise StoreError("the state is closed")
        if self._store is None:
            self._id = self._ranks.gather(uuid.uuid4().hex)[0]
            self._open(None)
        assert self._store is not None
        return self._store

    def _open(self, checkpoints: Checkpoints | None) -> Path | None:
        """Open the store at the newest of the snapshots, or at the beginning. Returns that snapshot."""
        where = self._config.url or ""
        owner = f"PerSampleState {self._id}"
        store = stores.build(StoreContext(self._layout, self._config, where, owner, self._id))
        if isinstance(store, ZarrStore) and local_path(where):
            store.lease_patience = 0.0
        try:
            store.hold(self._ranks)
            found = self._newest(store, checkpoints) if checkpoints is not None else None
            source = None if found is None else Snapshot(found / "state", where, store.repair)
            if source is not None and source.order.fingerprint() != self.order.fingerprint():
                raise CheckpointError(f"{found} was written with another order than {RECORD} states")
            epoch, step = (0, 0) if source is None else (source.epoch, source.step)
            store.start(epoch, step, source)
        except BaseException:
            store.close()
            raise
        self._store, self._epoch, self._step = store, epoch, step
        if checkpoints is not None and found is not None and self._ranks.is_rank_zero:
            for line in checkpoints.discard_after(step_of(found)):
                log.info(line)
        return found

    def _newest(self, store: X0Store, checkpoints: Checkpoints) -> Path | None:
        """The newest valid snapshot. The store keeps what any of the snapshots refers to."""

        def newest() -> tuple[Path | None, list[int]]:
            return checkpoints.newest_valid(), [step_of(each) for each in checkpoints.all()]

        found, steps = self._ranks.run_on_rank_zero(newest, _FAILURES)
        self._retain(store, steps)
        return found

    def _retain(self, store: X0Store, steps: list[int]) -> None:
        epochs = {step // self.steps_per_epoch for step in steps}
        store.retain(epochs | {epoch + 1 for epoch in epochs})

    def close(self) -> None:
        """Stop the background work and release the store. What was written since the last snapshot may be lost.

        Other ranks must be done with their steps when rank 0 calls this; a `with` block waits for them.
        """
        self._closed = True
        with self._held:
            if self._store is not None:
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._ranks.barrier()
        self.close()
