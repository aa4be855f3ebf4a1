"""Random numbers as functions of their position: their distributions, and the arguments they depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from udddm import rng
from udddm.rng import Stream

SEEDS = st.integers(0, 2**63 - 1)
PARTS = st.integers(0, 2**40)


def draw(seed: int, stream: Stream, count: int, shape: tuple[int, ...], *parts: int) -> torch.Tensor:
    return rng.normal(rng.as_tensor(rng.keys(seed, stream, np.arange(count), *parts)), shape)


def naive_mix(z: int) -> int:
    """The finalizer of splitmix64 in Python integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def same_distribution(values: np.ndarray, chance: float = 1e-4) -> None:
    """Kolmogorov-Smirnov against N(0, 1). The draws are fixed, so the result is always the same."""
    assert stats.kstest(values, "norm").pvalue > chance


def test_normal_has_the_moments_of_a_standard_normal() -> None:
    x = draw(0, Stream.NOISE, 1000, (3, 20, 20)).double().numpy().ravel()
    n = len(x)
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs((x**power).mean() - expected) < 4 * np.sqrt(variance / n), power
    assert 4.5 < np.abs(x).max() < 6.7  # the largest of a million; the limit of Box-Muller on 32 bits is 6.7


@pytest.mark.parametrize("stream", list(Stream))
def test_normal_is_normal_in_every_stream(stream: Stream) -> None:
    same_distribution(draw(3, stream, 500, (1, 10, 10)).numpy().ravel())


def test_normal_is_normal_across_keys_at_every_element() -> None:
    x = draw(1, Stream.NOISE, 5000, (2, 3, 3)).flatten(1).numpy()
    for element in range(x.shape[1]):
        same_distribution(x[:, element])
    same_distribution(x[:, 0] * np.sqrt(0.5) + x[:, 9] * np.sqrt(0.5))  # the two halves of one Box-Muller pair


def test_elements_of_a_key_are_uncorrelated() -> None:
    x = draw(2, Stream.NOISE, 20_000, (1, 4, 5)).flatten(1).double().numpy()
    for values in (x, x**2):
        correlation = np.corrcoef(values.T) - np.eye(x.shape[1])
        assert np.abs(correlation).max() < 4.5 / np.sqrt(len(x))


def test_neighboring_keys_epochs_streams_and_seeds_are_uncorrelated() -> None:
    shape = (1, 100, 100)
    base = draw(0, Stream.NOISE, 8, shape, 0)
    others = [
        base.roll(1, 0),
        draw(0, Stream.NOISE, 8, shape, 1),
        draw(0, Stream.CONDITION, 8, shape, 0),
        draw(1, Stream.NOISE, 8, shape, 0),
        draw(0, Stream.NOISE, 8, shape),
    ]
    for other in others:
        for shift in (0, 1, 50):  # a sequence must not continue another one either
            a, b = base.flatten(1).double().numpy(), other.flatten(1).roll(shift, 1).double().numpy()
            correlation = np.array([np.corrcoef(p, q)[0, 1] for p, q in zip(a, b, strict=True)])
            assert np.abs(correlation).max() < 4.5 / np.sqrt(a.shape[1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 3), (3, 8, 8), (3, 32, 32)])
def test_a_row_depends_on_its_key_alone(shape: tuple[int, ...]) -> None:
    keys = rng.as_tensor(rng.keys(7, Stream.NOISE, np.arange(67)))
    whole = rng.normal(keys, shape)
    for size in (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64):
        pieces = torch.cat([rng.normal(part, shape) for part in keys.split(size)])
        assert torch.equal(pieces, whole), size
    shuffle = torch.randperm(67, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rng.normal(keys[shuffle], shape), whole[shuffle])


def test_a_row_does_not_depend_on_the_number_of_threads() -> None:
    keys = rng.as_tensor(rng.keys(7, Stream.NOISE, np.arange(64)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = rng.normal(keys, (3, 33, 33))
        torch.set_num_threads(4)
        assert torch.equal(rng.normal(keys, (3, 33, 33)), alone)
    finally:
        torch.set_num_threads(before)


def test_no_keys_give_no_rows() -> None:
    assert rng.normal(torch.empty(0, dtype=torch.int64), (1, 2, 2)).shape == (0, 1, 2, 2)


@given(SEEDS, st.lists(PARTS, min_size=1, max_size=20))
def test_numpy_and_torch_agree_on_bits(seed: int, parts: list[int]) -> None:
    keys = rng.keys(seed, Stream.NOISE, np.array(parts))
    tensor = rng.as_tensor(keys)
    assert [int(k) % 2**64 for k in tensor] == [int(k) for k in keys]
    x = rng.normal(tensor, (1, 3, 3)).flatten(1).numpy()
    for row, key in zip(x, keys, strict=True):  # Box-Muller with Python integers
        bits = [naive_mix((int(key) + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(5)]
        radius = np.sqrt(-2 * np.log([((b >> 32) + 0.5) / 2**32 for b in bits]))
        angle = np.array([2 * np.pi * (b & 0xFFFFFFFF) / 2**32 for b in bits])
        expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:9]
        np.testing.assert_allclose(row, expected, rtol=2e-6, atol=1e-7)


@given(SEEDS, PARTS, PARTS)
def test_scalar_and_array_keys_are_the_same(seed: int, a: int, b: int) -> None:
    grid = rng.keys(seed, Stream.NOISE, np.array([[a], [b]]), np.array([b, a, 3]))
    assert grid.shape == (2, 3)
    assert int(grid[0, 0]) == rng.key(seed, Stream.NOISE, a, b)
    assert int(grid[1, 2]) == rng.key(seed, Stream.NOISE, b, 3)


@given(st.integers(0, 2**64 - 1))
def test_splitmix64_is_the_finalizer_of_the_reference(value: int) -> None:
    with np.errstate(over="ignore"):
        assert int(rng.splitmix64(np.uint64(value))) == naive_mix(value)


@given(SEEDS, PARTS, PARTS)
def test_keys_differ_between_streams_seeds_parts_and_their_order(seed: int, a: int, b: int) -> None:
    found = [rng.key(seed, stream, *parts) for stream in Stream for parts in ((), (a,), (a, b), (a, b, 0))]
    found += [rng.key(seed + 1, Stream.NOISE, a, b), rng.key(seed, Stream.NOISE, a + 1, b)]
    if a != b:
        found += [rng.key(seed, Stream.NOISE, b, a), rng.key(seed, Stream.NOISE, b)]
    assert len(set(found)) == len(found)


def test_keys_of_a_grid_of_samples_and_epochs_are_all_different() -> None:
    grid = rng.keys(0, Stream.NOISE, np.arange(2000)[:, None], np.arange(200))
    assert len(np.unique(grid)) == grid.size


def test_bits_of_keys_are_fair_and_change_with_every_part() -> None:
    keys = rng.keys(0, Stream.TIME, np.arange(20_000), 5)
    neighbour = rng.keys(0, Stream.TIME, np.arange(20_000), 6)
    for words in (keys, keys ^ neighbour, keys ^ np.roll(keys, 1)):
        ones = (words[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(0)
        assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / np.sqrt(len(keys))


@given(st.integers(1, 2**32 - 1), SEEDS)
def test_randint_is_below_its_limit(limit: int, seed: int) -> None:
    drawn = rng.randint(limit, rng.keys(seed, Stream.TIME, np.arange(20)))
    assert drawn.dtype == np.int64 and drawn.min() >= 0 and drawn.max() < limit


def test_randint_reaches_both_ends_and_takes_one_limit_per_key() -> None:
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert rng.randint(2**32 - 1, ends).tolist() == [0, 2**32 - 2]
    assert rng.randint(np.array([5, 7]), ends).tolist() == [0, 6]


@pytest.mark.parametrize("limit", [2, 7, 33, 1000])
def test_randint_is_uniform(limit: int) -> None:
    drawn = rng.randint(limit, rng.keys(0, Stream.TIME, np.arange(200_000)))
    assert stats.chisquare(np.bincount(drawn, minlength=limit)).pvalue > 1e-4


@given(st.integers(0, 500), st.integers(0, 2**64 - 1))
def test_permutation_contains_every_value_once(count: int, key: int) -> None:
    assert sorted(rng.permutation(count, key)) == list(range(count))


def test_permutation_is_uniform() -> None:
    rows = np.array([rng.permutation(4, rng.key(0, Stream.WINDOW, i)) for i in range(24_000)])
    _, counts = np.unique(rows @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24  # every permutation of four
    assert stats.chisquare(counts).pvalue > 1e-4


def test_permutation_moves_values_to_every_position() -> None:
    rows = np.array([rng.permutation(30, rng.key(0, Stream.WINDOW, i)) for i in range(20_000)])
    for place in (0, 13, 29):
        assert stats.chisquare(np.bincount(rows[:, place], minlength=30)).pvalue > 1e-4


def test_random_numbers_do_not_change_between_versions() -> None:
    """Golden values. If these change, existing runs cannot be resumed, and seeds give other images."""
    with np.errstate(over="ignore"):
        first = rng.splitmix64(np.uint64(0x9E3779B97F4A7C15))
    assert int(first) == 0xE220A8397B1DCDAF  # the first output of splitmix64's reference code for seed 0
    assert rng.key(0, Stream.PERMUTATION) == 0xE220A8397B1DCDAF
    assert rng.key(0, Stream.NOISE, 0) == 0x43974CC0ECEB0AA8
    assert rng.key(1, Stream.NOISE, 123456, 7) == 0x060498FCA51CA0EA
    assert rng.key(2**63 - 1, Stream.SAMPLE_NOISE, 5, 6, 7) == 0x5D08A6F3FDBC672D
    assert rng.permutation(10, 42).tolist() == [5, 2, 7, 3, 9, 4, 0, 1, 8, 6]
    assert rng.randint(1000, rng.keys(0, Stream.TIME, np.arange(5))).tolist() == [115, 779, 795, 909, 665]
    drawn = rng.normal(rng.as_tensor(rng.keys(0, Stream.NOISE, np.array([0, 1]))), (1, 1, 3))
    expected = [[[[-0.62009609, -1.45820725, 0.83977008]]], [[[-0.03926511, 0.68494242, 0.53458887]]]]
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=1e-6)


def test_streams_keep_their_numbers() -> None:
    assert [stream.value for stream in Stream] == list(range(1, len(Stream) + 1))
    assert Stream.NOISE == 6 and Stream.SAMPLE_NOISE == 11 and Stream.SAMPLE_LABEL == 15
