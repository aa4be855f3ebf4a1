"""Guarantees of the order (docs/architecture.md): every sample once per epoch, chunk by chunk, on any ranks."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from udddm.config import OrderConfig
from udddm.errors import ConfigError, LanesError
from udddm.order import Batch, LaneStep, Order, most_lanes, settled

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """Small orders of all kinds: N not a multiple of L, short last chunks, windows below a step and above a lane."""

    seed: int
    samples: int
    share: int
    lanes: int
    chunk: int
    window: int
    epoch: int

    def order(self, seed: int | None = None) -> Order:
        seed = self.seed if seed is None else seed
        return Order(seed, self.samples, self.share * self.lanes, self.lanes, self.chunk, self.window)

    @property
    def worlds(self) -> list[int]:
        return [w for w in range(1, self.lanes + 1) if self.lanes % w == 0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    return Case(
        seed=draw(st.integers(0, 2**63 - 1)),
        samples=draw(st.integers(lanes, 200)),
        share=draw(st.integers(1, 24)),
        lanes=lanes,
        chunk=draw(st.integers(1, 40)),
        window=draw(st.integers(1, 6)),
        epoch=draw(st.integers(0, 1000)),
    )


def batches(order: Order, epoch: int, world: int = 1) -> list[list[Batch]]:
    """[step][rank]."""
    lanes = [order.lanes_of(rank, world) for rank in range(world)]
    return [[order.batch_of(own, epoch, step) for own in lanes] for step in range(order.steps_per_epoch)]


def visited(order: Order, epoch: int, lane: int) -> list[LaneStep]:
    return [part for step in range(order.steps_per_epoch) for part in order.lane_step(lane, epoch, step)]


@quick
@given(cases())
def test_every_sample_is_visited_exactly_once_per_epoch(case: Case) -> None:
    order = case.order()
    ids = np.concatenate([b.ids[b.weights > 0] for [b] in batches(order, case.epoch)])
    assert sorted(ids) == list(range(case.samples))


@quick
@given(cases())
def test_batches_have_one_shape_and_only_padding_has_weight_0(case: Case) -> None:
    order = case.order()
    for world in case.worlds:
        for step, ranks in enumerate(batches(order, case.epoch, world)):
            for batch in ranks:
                assert batch.ids.shape == batch.slots.shape == batch.weights.shape == (order.batch_size // world,)
                assert set(batch.weights.tolist()) <= {0.0, 1.0}
                padding = batch.weights == 0
                assert not batch.ids[padding].any() and not batch.slots[padding].any()
                if step < order.steps_per_epoch - 1:  # lanes differ by one sample: only the last step is short
                    assert not padding.any()
                assert sum(len(part.rows) for part in batch.parts) == (~padding).sum()


@quick
@given(cases())
def test_an_epoch_has_no_more_steps_than_its_longest_lane_needs(case: Case) -> None:
    order = case.order()
    longest = max(order.lane_slots(lane) for lane in range(case.lanes))
    assert order.longest_lane == longest
    assert (order.steps_per_epoch - 1) * case.share < longest <= order.steps_per_epoch * case.share
    assert not order.lane_step(0, case.epoch, order.steps_per_epoch)


@quick
@given(cases())
def test_total_is_the_samples_of_the_step_over_all_ranks(case: Case) -> None:
    order = case.order()
    for world in case.worlds:
        totals = []
        for ranks in batches(order, case.epoch, world):
            assert {b.total for b in ranks} == {int(sum(b.weights.sum() for b in ranks))}
            totals.append(ranks[0].total)
        assert sum(totals) == case.samples


@quick
@given(cases())
def test_a_step_does_not_depend_on_the_number_of_ranks(case: Case) -> None:
    """The concatenated batches of all ranks equal that of one rank: the same samples at the same positions."""
    alone = batches(case.order(), case.epoch)
    for world in case.worlds[1:]:
        for [whole], ranks in zip(alone, batches(case.order(), case.epoch, world), strict=True):
            for name in ("ids", "slots", "weights"):
                joined = np.concatenate([getattr(b, name) for b in ranks])
                np.testing.assert_array_equal(joined, getattr(whole, name))
            parts = [part for b in ranks for part in b.parts]
            for one, other in zip(parts, whole.parts, strict=True):
                assert (one.lane, one.window, one.first) == (other.lane, other.window, other.first)
                np.testing.assert_array_equal(one.rows, other.rows)


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_a_step_is_a_pure_function_of_its_position(case: Case, random: object) -> None:
    """Neither previous calls nor caches have an effect: the steps of another order, in reverse, are the same."""
    forward, backward = case.order(), case.order()
    expected = batches(forward, case.epoch)
    backward.batch_of(range(case.lanes), case.epoch + 1, 0)
    for step in reversed(range(backward.steps_per_epoch)):
        batch = backward.batch_of(range(case.lanes), case.epoch, step)
        np.testing.assert_array_equal(batch.ids, expected[step][0].ids)


@quick
@given(cases())
def test_a_lane_reads_each_chunk_in_one_window_and_each_window_in_one_run_of_steps(case: Case) -> None:
    order = case.order()
    for lane in range(case.lanes):
        parts = visited(order, case.epoch, lane)
        windows = [part.window for part in parts]
        assert [w for w, _ in itertools.groupby(windows)] == list(range(order.num_windows(lane)))
        home: dict[int, set[int]] = defaultdict(set)
        for part in parts:
            for slot in order.part_slots(part, case.epoch) - order.lane_start(lane):
                home[int(slot) // order.chunk_size].add(part.window)
        assert {chunk: {order.window_of(lane, case.epoch, chunk)} for chunk in range(order.num_chunks(lane))} == home
        assert max(len([c for c, w in home.items() if w == {window}]) for window in set(windows)) <= case.window


@quick
@given(cases())
def test_a_rank_touches_only_chunks_of_its_own_lanes(case: Case) -> None:
    order = case.order()
    for world in case.worlds:
        for rank in range(world):
            own = order.lanes_of(rank, world)
            low, high = order.lane_start(own.start), order.lane_start(own.stop)
            for step in range(order.steps_per_epoch):
                batch = order.batch_of(own, case.epoch, step)
                slots = batch.slots[batch.weights > 0]
                assert ((slots >= low) & (slots < high)).all()
                assert {part.lane for part in batch.parts} <= set(own)


@quick
@given(cases())
def test_windows_are_finished_at_the_last_step_of_the_window(case: Case) -> None:
    order = case.order()
    for lane in range(case.lanes):
        last = {
            p.window: step for step in range(order.steps_per_epoch) for p in order.lane_step(lane, case.epoch, step)
        }
        for window in range(order.num_windows(lane)):
            assert order.last_step_of_window(lane, case.epoch, window) == last[window]


@quick
@given(cases())
def test_spans_rows_offsets_and_slots_are_consistent(case: Case) -> None:
    """`window_span`, `window_rows`, `row_offset`, `window_of` and `locate` agree with the visits of the steps."""
    order = case.order()
    for lane in range(case.lanes):
        start = 0
        for window in range(order.num_windows(lane)):
            low, high = order.window_span(lane, case.epoch, window)
            chunks = order.window_chunks_of(lane, case.epoch, window)
            assert low == start and high - low == sum(order.chunk_slots(lane, c) for c in chunks)
            start = high
            assert sorted(order.window_rows(lane, case.epoch, window)) == list(range(high - low))
        assert start == order.lane_slots(lane)
        count = 0
        for part in visited(order, case.epoch, lane):
            low, _ = order.window_span(lane, case.epoch, part.window)
            rows = order.window_rows(lane, case.epoch, part.window)
            np.testing.assert_array_equal(part.rows, rows[count - low : count - low + len(part.rows)])
            assert part.first == count % order.samples_per_lane_step
            count += len(part.rows)
            slots = order.part_slots(part, case.epoch)
            for sample, row in zip(order.sample_of(slots), part.rows, strict=True):
                at, chunk, inside = order.locate(int(sample))
                assert at == lane and order.window_of(lane, case.epoch, chunk) == part.window
                assert order.row_offset(lane, case.epoch, chunk) + inside == row


@quick
@given(cases())
def test_chunks_partition_the_samples(case: Case) -> None:
    order = case.order()
    found = []
    for lane in range(case.lanes):
        for chunk in range(order.num_chunks(lane)):
            samples = order.chunk_samples(lane, chunk)
            assert 1 <= len(samples) == order.chunk_slots(lane, chunk) <= order.chunk_size
            assert [order.locate(int(s)) for s in samples] == [(lane, chunk, row) for row in range(len(samples))]
            found += samples.tolist()
    assert sorted(found) == list(range(case.samples))
    slots = [order.lane_slots(lane) for lane in range(case.lanes)]
    assert sum(slots) == case.samples and max(slots) - min(slots) <= 1


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 1000])
def test_slots_and_samples_are_a_permutation_and_its_inverse(samples: int) -> None:
    order = Order(5, samples, 1, 1, 10, 1)
    slots = np.arange(samples)
    assert sorted(order.sample_of(slots)) == list(range(samples))
    np.testing.assert_array_equal(order.slot_of(order.sample_of(slots)), slots)


@pytest.mark.parametrize("samples", [10**6 + 3, 10**9, 2**31 + 1, 2**36])
def test_slots_invert_for_a_billion_samples_without_a_table(samples: int) -> None:
    order = Order(1, samples, 8, 8, 1000, 8)
    slots = np.concatenate([[0, 1, samples // 2, samples - 2, samples - 1], np.arange(0, samples, samples // 997)])
    found = order.sample_of(slots)
    assert found.min() >= 0 and found.max() < samples and len(np.unique(found)) == len(np.unique(slots))
    np.testing.assert_array_equal(order.slot_of(found), slots)
    np.testing.assert_array_equal(order.sample_of(order.slot_of(slots)), slots)
    for lane in range(8):
        ends = np.array([order.lane_start(lane), order.lane_start(lane + 1) - 1])
        assert [order.locate(int(i)) for i in order.sample_of(ends)] == [
            (lane, 0, 0),
            (lane, *divmod(order.lane_slots(lane) - 1, order.chunk_size)),
        ]


def test_a_step_of_a_billion_samples_is_found_without_listing_them() -> None:
    batch = Order(1, 10**9, 8, 8, 1000, 8).batch_of(range(8), 3, 2)
    assert len(set(batch.ids.tolist())) == 8 and batch.total == 8


def test_slots_spread_the_samples_of_a_sorted_data_set() -> None:
    """The first tenth of the slots has a fair share of every tenth of the samples, and neighbors are separated."""
    order = Order(0, 50_000, 1, 1, 100, 1)
    samples = order.sample_of(np.arange(50_000))
    assert stats.chisquare(np.bincount(samples[:5000] // 5000, minlength=10)).pvalue > 1e-4
    assert abs(np.corrcoef(samples[1:], samples[:-1])[0, 1]) < 4.5 / np.sqrt(50_000)
    assert np.mean(samples == np.arange(50_000)) < 1e-3


def test_with_one_window_per_lane_the_entire_lane_is_shuffled() -> None:
    """Every slot comes first, and every pair of slots comes in either order, equally often."""
    order = Order(0, 40, 4, 2, 4, 5)
    assert order.num_windows(0) == order.num_windows(1) == 1
    epochs = 4000
    for lane in (0, 1):
        slots = np.array(
            [np.concatenate([order.part_slots(p, e) for p in visited(order, e, lane)]) for e in range(epochs)]
        )
        slots -= order.lane_start(lane)
        for place in (0, 7, 19):
            assert stats.chisquare(np.bincount(slots[:, place], minlength=20)).pvalue > 1e-4
        followed = slots[:, 1:][slots[:, :-1] == 3]  # the slot after slot 3 may be any other slot
        counts = np.bincount(followed, minlength=20)
        assert counts[3] == 0 and stats.chisquare(np.delete(counts, 3)).pvalue > 1e-4


def test_with_small_windows_every_chunk_comes_first_equally_often() -> None:
    order = Order(0, 40, 4, 2, 4, 2)
    first = [order.window_chunks_of(1, e, 0)[0] for e in range(4000)]
    assert stats.chisquare(np.bincount(first, minlength=5)).pvalue > 1e-4


def test_epochs_lanes_and_seeds_shuffle_differently() -> None:
    order = Order(0, 400, 8, 4, 10, 3)

    def sequence(order: Order, epoch: int, lane: int) -> list[int]:
        slots = np.concatenate([order.part_slots(p, epoch) for p in visited(order, epoch, lane)])
        return (slots - order.lane_start(lane)).tolist()

    found = [sequence(order, epoch, lane) for epoch in range(5) for lane in range(4)]
    found.append(sequence(Order(1, 400, 8, 4, 10, 3), 0, 0))
    assert len({tuple(s) for s in found}) == len(found)
    for a, b in itertools.combinations(found, 2):
        assert np.mean(np.array(a) == np.array(b)) < 0.15
    slots = np.arange(400)
    assert np.mean(order.sample_of(slots) == Order(1, 400, 8, 4, 10, 3).sample_of(slots)) < 0.05


@pytest.mark.parametrize(
    ("lanes", "world", "nearest"),
    [
        (8, 3, "2 and 4"),
        (12, 5, "4 and 6"),
        (16, 13, "8 and 16"),
        (8, 16, "4 and 8"),
        (9, 8, "3 and 9"),
    ],
)
def test_the_error_names_the_nearest_numbers_of_ranks_that_divide_the_lanes(
    lanes: int, world: int, nearest: str
) -> None:
    order = Order(0, 100, lanes, lanes, 4, 2)
    with pytest.raises(ConfigError, match=rf"{world} ranks .*order\.lanes={lanes}.*: {nearest}(\. A run keeps .*)?$"):
        order.lanes_of(0, world)


def test_more_ranks_than_lanes_need_a_new_run_with_more_lanes() -> None:
    with pytest.raises(LanesError, match=r"begin another with order\.lanes=16,.*train\.init_from") as raised:
        Order(0, 100, 8, 8, 4, 2).lanes_of(0, 16)
    sent = pickle.loads(pickle.dumps(raised.value))
    assert (sent.lanes, str(sent)) == (8, str(raised.value))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_lanes_are_divided_among_ranks(world: int) -> None:
    order = Order(0, 100, 8, 8, 4, 2)
    assert [lane for rank in range(world) for lane in order.lanes_of(rank, world)] == list(range(8))


def test_a_sample_number_out_of_range_is_refused() -> None:
    order = Order(0, 100, 8, 8, 4, 2)
    for sample in (-1, 100):
        with pytest.raises(ConfigError, match=f"no sample {sample}: the data set has 100"):
            order.locate(sample)


def test_lanes_must_divide_the_batch_and_each_have_a_sample() -> None:
    with pytest.raises(ConfigError, match=r"order\.lanes=8 must divide train\.batch_size=12"):
        Order(0, 100, 12, 8, 4, 2)
    with pytest.raises(ConfigError, match=r"7 samples, fewer than order\.lanes=8"):
        Order(0, 7, 8, 8, 4, 2)


def test_defaults_are_chunks_of_4_mib_of_float16_and_eight_chunks_per_window() -> None:
    order = Order.build(OrderConfig(lanes=8), 0, 10**6, 128, (3, 32, 32))
    assert order.chunk_size * 3 * 32 * 32 * 2 <= 4 << 20 < (order.chunk_size + 1) * 3 * 32 * 32 * 2
    assert order.chunks_per_window == 8
    cifar10 = Order.build(OrderConfig(), 0, 50_000, 128, (3, 32, 32))
    assert (cifar10.num_lanes, cifar10.chunk_size, cifar10.chunks_per_window) == (8, order.chunk_size, 8)
    assert Order.build(OrderConfig(), 0, 100, 8, (3, 2048, 2048)).chunk_size == 1
    assert Order.build(OrderConfig(chunk=7, window=3), 0, 100, 8, (1, 2, 2)).fingerprint() == {
        "seed": 0,
        "samples": 100,
        "batch": 8,
        "lanes": 8,
        "chunk": 7,
        "window": 3,
    }


@given(
    samples=st.integers(1, 5_000_000),
    batch=st.integers(1, 4096),
    side=st.sampled_from([1, 8, 32, 64, 256]),
    chunk=st.none() | st.integers(1, 1000),
    window=st.none() | st.integers(1, 9),
)
def test_a_new_run_has_as_many_lanes_as_its_data_set_fills(
    samples: int, batch: int, side: int, chunk: int | None, window: int | None
) -> None:
    """64 where each has four chunks or more, in chunks of 1 to 2 MiB of float16 (or one image); otherwise at most 8."""
    shape, row = (3, side, side), 2 * 3 * side * side
    config = settled(OrderConfig(chunk=chunk, window=window), samples, batch, shape)
    assert config.lanes is not None and batch % config.lanes == 0 and config.lanes <= samples
    assert settled(config, samples, batch, shape) == config  # what a run records does not change again
    built = Order.build(config, 0, samples, batch, shape)
    at_once = Order.build(OrderConfig(chunk=chunk, window=window), 0, samples, batch, shape)
    assert built.fingerprint() == at_once.fingerprint()
    if config.lanes > 8:
        assert config.lanes == math.gcd(64, batch)
        assert built.num_chunks(config.lanes - 1) >= 4
        assert config.window == (window or 64 // config.lanes) and config.chunk is not None
        if chunk is None:
            assert config.chunk == 1 or config.chunk * row <= 2 << 20
            assert config.chunk * row > 1 << 20 or row > 1 << 18
            assert built.num_chunks(0) * config.chunk < built.lane_slots(0) + built.num_chunks(0)  # evenly filled
    else:
        assert (config.chunk, config.window) == (chunk, window)
        assert config.lanes == math.gcd(8, batch) or config.lanes * 2 > samples
        assert batch % 16 or samples < 64 * 4 * (chunk or max(1, (2 << 20) // row))
    assert config.lanes <= most_lanes(OrderConfig(), batch)


def test_lanes_that_are_set_are_obeyed() -> None:
    for lanes in (1, 8, 128):
        assert settled(OrderConfig(lanes=lanes), 10**7, 128, (3, 32, 32)) == OrderConfig(lanes=lanes)
        assert most_lanes(OrderConfig(lanes=lanes), 128) == lanes


def test_the_order_does_not_change_between_versions() -> None:
    """Golden values: a resumed run must continue with the order of its first part."""
    order = Order(42, 21, 4, 2, 3, 2)
    assert order.sample_of(np.arange(8)).tolist() == [6, 9, 19, 8, 16, 3, 13, 0]
    assert [b.ids.tolist() for [b] in batches(order, 1)] == [
        [18, 0, 14, 15],
        [13, 10, 11, 20],
        [2, 3, 1, 5],
        [16, 9, 17, 12],
        [6, 19, 4, 7],
        [8, 0, 0, 0],
    ]
