"""The normal distribution and the logistic function on arrays, in float64.

`ndtri` and `expit` are bitwise equal to those of `scipy.special`: the rational functions of `ndtri` and their
coefficients are those of the Cephes library (Moshier 1989). log and exp are those of the C library, applied element by
element, because NumPy's vectorized versions differ in the last bit between machines. Arrays have one element per sample
of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Rational functions (numerator, denominator; highest power first): of y - 1/2 for y in (exp(-2), 1 - exp(-2)), of 1 / x
# with x = sqrt(-2 log y) < 8, and of 1 / x for larger x.
# fmt: off
_CENTER = (
    (-59.96335010141079, 98.00107541859997, -56.67628574690703, 13.931260938727968, -1.2391658386738125),
    (1.0, 1.9544885833814176, 4.676279128988815, 86.36024213908905, -225.46268785411937, 200.26021238006066,
     -82.03722561683334, 15.90562251262117, -1.1833162112133),
)
_TAIL = (
    (4.0554489230596245, 31.525109459989388, 57.16281922464213, 44.08050738932008, 14.684956192885803,
     2.1866330685079025, -0.1402560791713545, -0.03504246268278482, -0.0008574567851546854),
    (1.0, 15.779988325646675, 45.39076351288792, 41.3172038254672, 15.04253856929075, 2.504649462083094,
     -0.14218292285478779, -0.03808064076915783, -0.0009332594808954574),
)
_FAR_TAIL = (
    (3.2377489177694603, 6.915228890689842, 3.9388102529247444, 1.3330346081580755, 0.20148538954917908,
     0.012371663481782003, 0.00030158155350823543, 2.6580697468673755e-06, 6.239745391849833e-09),
    (1.0, 6.02427039364742, 3.6798356385616087, 1.3770209948908132, 0.21623699359449663,
     0.013420400608854318, 0.00032801446468212774, 2.8924786474538068e-06, 6.790194080099813e-09),
)
# fmt: on
_EDGE = 0.1353352832366127  # exp(-2)
_SQRT_2_PI = 2.5066282746310007


def expit(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + _each(math.exp, (-x).clip(max=709.0)))  # exp(710) overflows


def ndtr(x: Floats) -> Floats:
    """The probability that a standard normal number is below x."""
    return 0.5 * _each(math.erfc, x * -math.sqrt(0.5))


def ndtri(p: Floats) -> Floats:
    """The inverse of `ndtr`, for p in (0, 1)."""
    upper = p > 1 - _EDGE
    y = np.where(upper, 1 - p, p)
    central = y > _EDGE
    result = np.empty_like(y)

    z = y[central] - 0.5
    square = z * z
    cubic = z * (square * _polynomial(_CENTER[0], square) / _polynomial(_CENTER[1], square))
    result[central] = (z + cubic) * _SQRT_2_PI

    x = np.sqrt(-2 * _each(math.log, y[~central]))
    inverse = 1 / x
    near, far = (
        inverse * _polynomial(above, inverse) / _polynomial(below, inverse) for above, below in (_TAIL, _FAR_TAIL)
    )
    distance = x - _each(math.log, x) / x - np.where(x < 8, near, far)
    result[~central] = np.where(upper[~central], distance, -distance)
    return result


def _each(function: Callable[[float], float], x: Floats) -> Floats:
    return np.array([function(one) for one in x.ravel().tolist()], dtype=np.float64).reshape(x.shape)


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
