"""Power-function profiles, and the approximation of one length by others."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udddm import ema
from udddm.config import resolve
from udddm.ema import PowerEMA
from udddm.errors import ConfigError
from udddm.runs import posthoc_ema

LENGTHS = st.floats(0.01, 0.287)


def profile(gamma: float, steps: int) -> np.ndarray:
    """The weight of each step 1..steps: the integral of the profile over the step."""
    ends = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return np.diff(ends)


# Profiles.


@given(LENGTHS)
def test_the_length_is_the_standard_deviation_of_the_profile(length: float) -> None:
    gamma = ema.exponent(length)
    assert gamma > 0 and ema.relative_length(gamma) == pytest.approx(length, rel=1e-9)
    t = (np.arange(200_000) + 0.5) / 200_000
    p = (gamma + 1) * t**gamma / len(t)
    assert p.sum() == pytest.approx(1, rel=1e-3)
    assert math.sqrt(p @ t**2 - (p @ t) ** 2) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2888, 1.0, math.nan])
def test_no_power_function_has_other_lengths(length: float) -> None:
    with pytest.raises(ValueError, match=r"below 0\.2887"):
        ema.exponent(length)


@given(LENGTHS, st.integers(1, 60), st.integers(0, 2**32))
def test_stepwise_updates_equal_the_sum_over_the_profile(length: float, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    live = torch.randn(5, generator=generator)
    average = PowerEMA({"w": live}, length)
    seen = []
    for step in range(1, steps + 1):
        live.copy_(torch.randn(5, generator=generator))
        average.update(step)
        seen.append(live.double().numpy().copy())
        if step == 1:
            assert torch.equal(average.weights["w"], live)
    expected = profile(ema.exponent(length), steps) @ np.stack(seen)
    np.testing.assert_allclose(average.weights["w"], expected, rtol=1e-4, atol=1e-5)


@given(LENGTHS, LENGTHS, st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_overlap_is_the_integral_of_the_product(length: float, other: float, until: float, other_until: float) -> None:
    t = (np.arange(400_000) + 0.5) / 400_000
    product = np.ones_like(t) / len(t)
    given_: list[np.ndarray] = []
    for end, gamma in ((until, ema.exponent(length)), (other_until, ema.exponent(other))):
        with np.errstate(under="ignore"):
            product *= np.where(t <= end, (gamma + 1) / end * np.minimum(t / end, 1) ** gamma, 0)
        given_ += [np.array(end), np.array(gamma)]
    assert float(posthoc_ema.overlap(*given_)) == pytest.approx(product.sum(), rel=0.01, abs=1e-6)


# Choosing a length afterwards.


def snapshots(lengths: tuple[float, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    steps = np.repeat(np.arange(1, count + 1, dtype=np.float64), len(lengths))
    return steps, np.tile([ema.exponent(length) for length in lengths], count)


@given(st.sampled_from([0.05, 0.1]), st.integers(1, 100))
def test_a_stored_length_is_its_own_snapshot(length: float, count: int) -> None:
    steps, gammas = snapshots((0.05, 0.1), count)
    weights, off = posthoc_ema.coefficients(steps, gammas, count, ema.exponent(length))
    expected = (steps == count) & (gammas == ema.exponent(length))
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert off < 1e-6


@given(LENGTHS, st.integers(1, 200))
def test_constant_weights_are_reproduced_exactly(length: float, count: int) -> None:
    steps, gammas = snapshots((0.05, 0.1), count)
    assert posthoc_ema.coefficients(steps, gammas, count, ema.exponent(length))[0].sum() == pytest.approx(1, abs=1e-9)


def test_more_snapshots_give_a_closer_approximation() -> None:
    for length in (0.04, 0.07, 0.15):
        offs = [
            posthoc_ema.coefficients(*snapshots((0.05, 0.1), n), n, ema.exponent(length))[1]
            for n in (1, 4, 16, 64, 400)
        ]
        assert all(b < a for a, b in itertools.pairwise(offs)) and offs[2] < 0.011 and offs[4] < 1e-3


@pytest.mark.parametrize("length", [0.04, 0.07, 0.12, 0.2])
def test_a_computed_length_is_close_to_one_kept_during_training(length: float) -> None:
    """On a random walk, which averaging changes the most."""
    generator = torch.Generator().manual_seed(0)
    live = torch.zeros(500)
    kept, wanted = [PowerEMA({"w": live}, one) for one in (0.05, 0.1)], PowerEMA({"w": live}, length)
    rows: list[tuple[int, float, np.ndarray]] = []
    for step in range(1, 1281):
        live += torch.randn(500, generator=generator)
        for average in (*kept, wanted):
            average.update(step)
        if step % 40 == 0:
            rows += [(step, one.exponent, one.weights["w"].half().double().numpy()) for one in kept]
    steps, gammas, values = (np.array(column) for column in zip(*rows, strict=True))
    weights, off = posthoc_ema.coefficients(steps.astype(np.float64), gammas, 1280, wanted.exponent)
    found, aim = weights @ values, wanted.weights["w"].double().numpy()
    assert off < 0.01
    assert np.linalg.norm(found - aim) / np.linalg.norm(aim) < 0.01
    distance = min(np.linalg.norm(one.weights["w"].numpy() - aim) for one in kept)
    assert np.linalg.norm(found - aim) < 0.1 * distance  # it is not simply one of the kept ones


@pytest.mark.parametrize("lengths", [[0.0], [0.288], [0.3], [-0.1], [0.05, 0.050]])
def test_invalid_ema_lengths_are_refused(lengths: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"train.power_ema"):
        resolve({"train": {"steps": 4, "power_ema": lengths}})
