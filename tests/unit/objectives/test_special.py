"""The special functions of the objectives equal those of SciPy, bit for bit where the weights of a run need it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import special as reference

from udddm.objectives import special

RNG = np.random.default_rng(0)
UNIFORM = RNG.random(200_000)


def test_ndtri_has_the_bits_of_scipy_in_the_center_and_in_both_tails() -> None:
    small = 10.0 ** -RNG.uniform(1, 300, 20_000)  # the far tail is below 1e-14
    p = np.concatenate([UNIFORM[UNIFORM > 0], small, 1 - small[small > 1e-16], [0.5, 2.0**-53, 1 - 2.0**-53]])
    assert np.array_equal(special.ndtri(p), reference.ndtri(p))


def test_expit_has_the_bits_of_scipy() -> None:
    x = np.concatenate([RNG.normal(size=50_000) * 10, -np.exp(RNG.normal(size=50_000) * 2), [0.0, 36.0, -700.0]])
    x = x[np.abs(x) < 709]
    assert np.array_equal(special.expit(x), reference.expit(x))


def test_expit_does_not_overflow() -> None:
    found = special.expit(np.array([-1e6, -745.0, 745.0, 1e6]))
    assert (found[:2] < 1e-300).all() and (found[2:] == 1).all()


@given(st.floats(-37, 37))
def test_ndtr_equals_that_of_scipy(x: float) -> None:
    found, expected = (function.ndtr(np.array([x]))[0] for function in (special, reference))
    assert abs(found - expected) <= 1e-13 * expected


def test_empty_arrays_and_shapes_are_kept() -> None:
    for function in (special.ndtri, special.ndtr, special.expit):
        assert function(np.zeros((0,))).shape == (0,)
        assert function(np.full((2, 3), 0.25)).shape == (2, 3)
