"""The order in which ranks visit samples: a pure function of (seed, N, B, L, C, W, epoch, step).

A fixed keyed permutation maps the N samples to N slots. Each of the L lanes owns a contiguous range of slots, divided
into chunks of C slots. In every epoch, each lane shuffles its chunks, groups them into windows of at most W chunks,
shuffles the slots within each window, and contributes B / L slots to every step. A lane is never split between ranks.
The samples of a step therefore do not depend on the number of ranks, and a rank accesses only chunks of its own lanes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from udddm import rng
from udddm.config import OrderConfig
from udddm.errors import ConfigError, LanesError
from udddm.rng import Stream

Indices = npt.NDArray[np.int64]

CHUNK_BYTES = 4 << 20
WINDOW_CHUNKS = 8
LANES, FEW_LANES = 64, 8
"""The lanes of a large and of a small data set, as far as they divide the batch size."""
SMALL_CHUNK_BYTES = 2 << 20
"""The largest chunk where there are `LANES`. All their windows together are 64 chunks, as those of `FEW_LANES` are."""
_FEWEST_CHUNKS = 4  # in each of `LANES`
_ROUNDS = 6
_RECORDED = ("seed", "samples", "batch", "lanes", "chunk", "window")  # names on disk


def check_world(lanes: int, world: int) -> None:
    """Raises LanesError, naming the nearest numbers of ranks that do, if `world` ranks do not divide the lanes."""
    if lanes % world:
        fitting = sorted((w for w in range(1, lanes + 1) if lanes % w == 0), key=lambda w: abs(w - world))[:2]
        more = (
            f". A run keeps its lanes: for more ranks begin another with order.lanes={math.lcm(lanes, world)}, which "
            "must divide train.batch_size, and with train.init_from to go on from the weights of an earlier run"
        )
        raise LanesError(
            f"{world} ranks do not divide order.lanes={lanes}; the nearest numbers of ranks that do: "
            + " and ".join(str(w) for w in sorted(fitting))
            + (more if world > lanes else ""),
            lanes,
        )


def most_lanes(config: OrderConfig, batch: int) -> int:
    """The lanes of a run with this configuration, or the most that it can have if they depend on the data set."""
    return config.lanes or math.gcd(LANES, batch)


def settled(config: OrderConfig, samples: int, batch: int, shape: tuple[int, ...]) -> OrderConfig:
    """The order with the lanes that a new run of `samples` images of `shape` (C, H, W) has if they are not set.

    These are `LANES` if each of them has at least four chunks of `SMALL_CHUNK_BYTES` of float16 values, or somewhat
    smaller ones of equal size, in windows of one chunk; otherwise `FEW_LANES`, with chunks and windows that do not
    depend on the data set. The result is recorded in the run, which keeps it. What is set is returned unchanged.
    """
    if config.lanes is not None:
        return config
    many = math.gcd(LANES, batch)
    chunk = config.chunk or max(1, SMALL_CHUNK_BYTES // (2 * int(np.prod(shape))))
    if many > FEW_LANES and samples >= many * _FEWEST_CHUNKS * chunk:
        longest = -(-samples // many)
        even = -(-longest // -(-longest // chunk))
        return OrderConfig(lanes=many, chunk=config.chunk or even, window=config.window or LANES // many)
    few = math.gcd(FEW_LANES, batch)
    while few > max(1, samples):
        few //= 2
    return config.model_copy(update={"lanes": few})


@dataclass(frozen=True)
class LaneStep:
    """The samples that a lane contributes to a step: `rows` [n] of the buffer of `window` (see `Order.window_rows`).

    `n` is B / L except at the end of a lane. A step that crosses from one window to the next has one part per window.
    """

    lane: int
    window: int
    rows: Indices
    first: int
    """The offset of these rows within the lane's B / L positions in the step."""


@dataclass(frozen=True)
class Batch:
    """The samples of one rank's part of a step, padded to a static shape."""

    ids: Indices
    """[b] sample numbers; 0 for padding."""
    slots: Indices
    """[b] global slots; 0 for padding."""
    weights: npt.NDArray[np.float32]
    """[b] 1 for samples, 0 for padding. Padding is neither trained on nor written to the store."""
    total: int
    """Number of samples in the step over all ranks. The loss is averaged over this number."""
    parts: tuple[LaneStep, ...]


class Order:
    """The order of a run.

    Args:
        seed: The seed of all permutations.
        samples: The number of samples in the data set (N).
        batch_size: Samples per step over all ranks (B).
        num_lanes: The number of lanes (L).
        chunk_size: Slots per chunk (C).
        chunks_per_window: The largest number of chunks per window (W).

    Raises ConfigError if there are fewer samples than lanes, or if the lanes do not divide the batch size.
    """

    def __init__(
        self, seed: int, samples: int, batch_size: int, num_lanes: int, chunk_size: int, chunks_per_window: int
    ):
        if samples < num_lanes:
            raise ConfigError(
                f"the data set has {samples} samples, fewer than order.lanes={num_lanes}; lower order.lanes"
            )
        if batch_size % num_lanes:
            raise ConfigError(f"order.lanes={num_lanes} must divide train.batch_size={batch_size}")
        self.seed, self.samples, self.batch_size, self.num_lanes = seed, samples, batch_size, num_lanes
        self.samples_per_lane_step = batch_size // num_lanes
        self.longest_lane = -(-samples // num_lanes)
        self._starts = [i * (samples // num_lanes) + min(i, samples % num_lanes) for i in range(num_lanes + 1)]
        self.chunk_size = min(chunk_size, self.longest_lane)
        self.chunks_per_window = chunks_per_window
        self.steps_per_epoch = -(-self.longest_lane // self.samples_per_lane_step)
        self._half_bits = max(1, ((samples - 1).bit_length() + 1) // 2)
        self._round_keys = [rng.key(seed, Stream.PERMUTATION, r) for r in range(_ROUNDS)]
        self._lane_windows = functools.lru_cache(maxsize=4 * num_lanes)(self._compute_window)
        self._batches = functools.lru_cache(maxsize=32)(self._compute_batch)
        self._lane_places = functools.lru_cache(maxsize=4 * num_lanes)(self._compute_places)
        self._lane_chunks = functools.lru_cache(maxsize=4 * num_lanes)(self._compute_chunks)
        self._window_slots = functools.lru_cache(maxsize=4 * num_lanes)(self._compute_slots)

    @classmethod
    def build(cls, config: OrderConfig, seed: int, samples: int, batch: int, shape: tuple[int, ...]) -> Order:
        """The configured order for images of `shape` (C, H, W). Raises ConfigError.

        Lanes that are not set are those of `settled`. Where they are set, a chunk is by default 4 MiB of float16
        values (whatever the store's dtype) and a window is 8 chunks.
        """
        config = settled(config, samples, batch, shape)
        assert config.lanes is not None
        chunk = config.chunk or max(1, CHUNK_BYTES // (2 * int(np.prod(shape))))
        return cls(seed, samples, batch, config.lanes, chunk, config.window or WINDOW_CHUNKS)

    @classmethod
    def from_fingerprint(cls, values: Mapping[str, int]) -> Self:
        """The order recorded in a store or snapshot. Raises KeyError, TypeError or ValueError for other values."""
        seed, samples, batch, lanes, chunk, window = (int(values[key]) for key in _RECORDED)
        return cls(seed, samples, batch, lanes, chunk, window)

    def fingerprint(self) -> dict[str, int]:
        """The values that identify the order, as recorded in stores and snapshots."""
        return {
            "seed": self.seed,
            "samples": self.samples,
            "batch": self.batch_size,
            "lanes": self.num_lanes,
            "chunk": self.chunk_size,
            "window": self.chunks_per_window,
        }

    # Slots and samples: a keyed permutation computed without a table, so that it scales to billions of samples.

    def sample_of(self, slots: Indices) -> Indices:
        """The sample in each global slot: a Feistel network on [0, 4^h), repeated until the result is below N."""
        return self._walk(slots, self._round_keys)

    def slot_of(self, samples: Indices) -> Indices:
        """The inverse of `sample_of`."""
        return self._walk(samples, self._round_keys, inverse=True)

    def _walk(self, values: Indices, round_keys: list[int], inverse: bool = False) -> Indices:
        result = np.array(values, dtype=np.int64)
        outside = np.arange(len(result))
        while len(outside):
            result[outside] = self._feistel(result[outside], round_keys, inverse)
            outside = outside[result[outside] >= self.samples]
        return result

    def _feistel(self, values: Indices, round_keys: list[int], inverse: bool) -> Indices:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values.astype(np.uint64) >> bits, values.astype(np.uint64) & mask
        with np.errstate(over="ignore"):
            for key in reversed(round_keys) if inverse else round_keys:
                if inverse:
                    left, right = right ^ (rng.splitmix64(left + np.uint64(key)) & mask), left
                else:
                    left, right = right, left ^ (rng.splitmix64(right + np.uint64(key)) & mask)
        return ((left << bits) | right).astype(np.int64)

    # Lanes, chunks and windows.

    def lane_start(self, lane: int) -> int:
        """The first global slot of a lane; the first N mod L lanes have one slot more."""
        return self._starts[lane]

    def lane_slots(self, lane: int) -> int:
        """The number of slots of a lane."""
        return self._starts[lane + 1] - self._starts[lane]

    def num_chunks(self, lane: int) -> int:
        """The number of chunks of a lane."""
        return -(-self.lane_slots(lane) // self.chunk_size)

    def chunk_slots(self, lane: int, chunk: int) -> int:
        """The number of slots of a chunk: `chunk_size`, except for the last chunk of a lane."""
        return min(self.chunk_size, self.lane_slots(lane) - chunk * self.chunk_size)

    def chunk_samples(self, lane: int, chunk: int) -> Indices:
        """The samples of a chunk, in slot order."""
        start = self.lane_start(lane) + chunk * self.chunk_size
        return self.sample_of(np.arange(start, start + self.chunk_slots(lane, chunk)))

    def locate(self, sample: int) -> tuple[int, int, int]:
        """(lane, chunk, row within the chunk) of a sample. Raises ConfigError if there is no such sample."""
        if not 0 <= sample < self.samples:
            raise ConfigError(f"there is no sample {sample}: the data set has {self.samples}, numbered from 0")
        slot = int(self.slot_of(np.array([sample]))[0])
        lane = next(i for i in range(self.num_lanes) if slot < self.lane_start(i + 1))
        return lane, *divmod(slot - self.lane_start(lane), self.chunk_size)

    def num_windows(self, lane: int) -> int:
        """The number of windows of a lane in every epoch."""
        return -(-self.num_chunks(lane) // self.chunks_per_window)

    def smallest_window(self, lane: int) -> int:
        """The smallest number of rows that a window of the lane can have in any epoch."""
        shortfall = self.chunk_size - self.chunk_slots(lane, self.num_chunks(lane) - 1)
        return self.num_chunks(lane) // self.num_windows(lane) * self.chunk_size - shortfall

    def window_chunks_of(self, lane: int, epoch: int, window: int) -> list[int]:
        """The chunks of a window, in the order of their rows in the window's buffer."""
        order = self._lane_chunks(lane, epoch)
        return [int(c) for c in order[self._window_start(lane, window) : self._window_start(lane, window + 1)]]

    def _window_start(self, lane: int, window: int) -> int:
        """A window's position in the epoch's order of chunks.

        Chunks are divided evenly among windows, so that the time of a full window is always available for reading the
        next one.
        """
        return window * self.num_chunks(lane) // self.num_windows(lane)

    def _compute_chunks(self, lane: int, epoch: int) -> Indices:
        return rng.permutation(self.num_chunks(lane), rng.key(self.seed, Stream.CHUNKS, epoch, lane))

    def window_rows(self, lane: int, epoch: int, window: int) -> Indices:
        """The rows of the window's buffer, in the order in which they are visited."""
        return self._lane_windows(lane, epoch, window)

    def _compute_places(self, lane: int, epoch: int) -> Indices:
        """Each chunk's position in the epoch's order: the inverse of `_lane_chunks`."""
        return np.argsort(self._lane_chunks(lane, epoch))

    def _compute_window(self, lane: int, epoch: int, window: int) -> Indices:
        low, high = self.window_span(lane, epoch, window)
        return rng.permutation(high - low, rng.key(self.seed, Stream.WINDOW, epoch, lane, window))

    def window_span(self, lane: int, epoch: int, window: int) -> tuple[int, int]:
        """The half-open range of the lane's visits in a window, counted from the start of the epoch.

        Only the last chunk of a lane may be short; the window that contains it is shorter by the same number of slots.
        """
        short = self.num_chunks(lane) - 1
        shortfall = self.chunk_size - self.chunk_slots(lane, short)
        place = int(self._lane_places(lane, epoch)[short])
        first, past = self._window_start(lane, window), self._window_start(lane, window + 1)
        start = first * self.chunk_size - (shortfall if place < first else 0)
        stop = past * self.chunk_size - (shortfall if place < past else 0)
        return start, stop

    def lane_step(self, lane: int, epoch: int, step: int) -> list[LaneStep]:
        """The rows of `lane` visited in `step`: one part per window, and usually a single one."""
        start = step * self.samples_per_lane_step
        stop = min(start + self.samples_per_lane_step, self.lane_slots(lane))
        parts = []
        window = max(0, start // self.chunk_size * self.num_windows(lane) // self.num_chunks(lane) - 1)
        while start < stop:
            low, high = self.window_span(lane, epoch, window)
            if start < high:
                rows = self.window_rows(lane, epoch, window)[start - low : stop - low]
                parts.append(LaneStep(lane, window, rows, start - step * self.samples_per_lane_step))
                start += len(rows)
            window += 1
        return parts

    def last_step_of_window(self, lane: int, epoch: int, window: int) -> int:
        """The last step that visits a row of the window."""
        return (self.window_span(lane, epoch, window)[1] - 1) // self.samples_per_lane_step

    def window_of(self, lane: int, epoch: int, chunk: int) -> int:
        """The window that contains a chunk in `epoch`."""
        place = int(self._lane_places(lane, epoch)[chunk])
        return ((place + 1) * self.num_windows(lane) - 1) // self.num_chunks(lane)

    def row_offset(self, lane: int, epoch: int, chunk: int) -> int:
        """A chunk's first row in the buffer of its window."""
        chunks = self.window_chunks_of(lane, epoch, self.window_of(lane, epoch, chunk))
        return sum(self.chunk_slots(lane, c) for c in chunks[: chunks.index(chunk)])

    def part_slots(self, part: LaneStep, epoch: int) -> Indices:
        """The global slots of a part's rows."""
        ends, offsets = self._window_slots(part.lane, epoch, part.window)
        slots: Indices = part.rows + offsets[ends.searchsorted(part.rows, side="right")]
        return slots

    def _compute_slots(self, lane: int, epoch: int, window: int) -> tuple[Indices, Indices]:
        """For each chunk of a window, in the order of the buffer: the row after its last, and its first slot less its
        first row."""
        chunks = self.window_chunks_of(lane, epoch, window)
        sizes = np.array([self.chunk_slots(lane, chunk) for chunk in chunks])
        ends = np.cumsum(sizes)
        return ends, self.lane_start(lane) + np.array(chunks) * self.chunk_size - (ends - sizes)

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes that a rank owns. Raises ConfigError if `world` does not divide the lanes."""
        check_world(self.num_lanes, world)
        own = self.num_lanes // world
        return range(rank * own, (rank + 1) * own)

    def batch_of(self, lanes: range, epoch: int, step: int) -> Batch:
        """The samples that the owner of `lanes` contributes to a step: [len(lanes) * B / L], lane after lane."""
        return self._batches(lanes, epoch, step)

    def _compute_batch(self, lanes: range, epoch: int, step: int) -> Batch:
        slots = np.zeros(len(lanes) * self.samples_per_lane_step, np.int64)
        weights = np.zeros(len(slots), np.float32)
        parts: list[LaneStep] = []
        for i, lane in enumerate(lanes):
            for part in self.lane_step(lane, epoch, step):
                place = slice(
                    i * self.samples_per_lane_step + part.first,
                    i * self.samples_per_lane_step + part.first + len(part.rows),
                )
                slots[place] = self.part_slots(part, epoch)
                weights[place] = 1
                parts.append(part)
        first = step * self.samples_per_lane_step
        shorter, longer = divmod(self.samples, self.num_lanes)
        total = (self.num_lanes - longer) * min(max(shorter - first, 0), self.samples_per_lane_step)
        total += longer * min(max(shorter + 1 - first, 0), self.samples_per_lane_step)
        ids = np.where(weights > 0, self.sample_of(slots), 0)
        return Batch(ids, slots, weights, total, tuple(parts))
