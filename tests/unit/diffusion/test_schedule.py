"""Schedules and preconditioning, compared with direct evaluations of the paper's formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from udddm.config import ScheduleConfig, resolve
from udddm.diffusion.schedule import SIGMA_HIGHEST, Coefficients, NoiseSchedule, build
from udddm.errors import ConfigError

Array = np.ndarray[Any, np.dtype[np.float64]]


def vp(**changes: Any) -> NoiseSchedule:
    return build(ScheduleConfig(kind="vp", timesteps=8000, **changes))


def ve(**changes: Any) -> NoiseSchedule:
    return build(ScheduleConfig(kind="ve", timesteps=1000, **changes))


def at(schedule: NoiseSchedule, t: Array) -> Coefficients:
    """The coefficients as NumPy arrays."""
    return Coefficients(*schedule.coefficients(t))


BOTH = pytest.mark.parametrize("schedule", [vp(), ve()], ids=["vp", "ve"])


def naive_alpha_bar() -> Array:
    """prod_(s <= t) (1 - beta_s) for t in 1..8000, beta linear from 1.5e-3 to 2e-2, factor by factor."""
    product, found = 1.0, []
    for s in range(8000):
        product *= 1 - (1.5e-3 + (2.0e-2 - 1.5e-3) * s / 7999)
        found.append(product)
    return np.array(found)


def test_vp_noises_by_the_product_of_alphas() -> None:
    alpha_bar, t = naive_alpha_bar(), np.arange(1.0, 8001)
    found = at(vp(), t)
    np.testing.assert_allclose(found.alpha, np.sqrt(alpha_bar), rtol=1e-6)
    np.testing.assert_allclose(found.sigma, np.sqrt(1 - alpha_bar), rtol=1e-6)
    np.testing.assert_allclose(vp().sigma(t), np.sqrt((1 - alpha_bar) / alpha_bar), rtol=1e-9)
    assert math.log(alpha_bar[-1]) == pytest.approx(-86, abs=1)


def test_vp_starts_at_the_first_beta_without_loss_of_digits() -> None:
    one = np.array([1.0])
    assert vp().sigma(one)[0] == pytest.approx(math.sqrt(1.5e-3 / (1 - 1.5e-3)), rel=1e-12)


def test_ve_noises_by_the_paper_s_formula() -> None:
    for rho in (3.0, 7.0, 20.0):
        expected = [
            (0.01 ** (1 / rho) + (t - 1) / (1000 - 1) * (50 ** (1 / rho) - 0.01 ** (1 / rho))) ** rho
            for t in range(1, 1001)
        ]
        t = np.arange(1.0, 1001)
        np.testing.assert_allclose(ve(rho=rho).sigma(t), expected, rtol=1e-12)
        found = at(ve(rho=rho), t)
        np.testing.assert_allclose(found.sigma, expected, rtol=1e-6)
        assert (found.alpha == 1).all()
    assert ve().sigma(np.array([1.0, 1000.0])) == pytest.approx([0.01, 50], rel=1e-12)
    assert ScheduleConfig().rho == 7


def test_vp_combines_by_1_and_minus_1_in_the_paper() -> None:
    t = np.arange(1.0, 8001)
    found = at(vp(preconditioning="paper"), t)
    assert (found.c_skip == 1).all() and (found.c_out == -1).all()
    assert (found.c_in == 1).all()
    np.testing.assert_allclose(found.c_noise, 1000 * t / 8000, rtol=1e-6)


def test_epsilon_is_the_estimate_of_a_network_that_predicts_the_noise() -> None:
    """If F is the noise, f is x_0, whatever the step; steps are numbered from 0, as in DDPM."""
    t = np.arange(1.0, 1001)
    ddpm = ScheduleConfig(kind="vp", timesteps=1000, beta_min=1e-4, beta_max=0.02, preconditioning="epsilon")
    found = at(build(ddpm), t)
    x0, noise = 0.7, -1.3
    xt = found.alpha.astype(np.float64) * x0 + found.sigma.astype(np.float64) * noise
    np.testing.assert_allclose(found.c_skip * xt + found.c_out * noise, x0, atol=1e-4)
    assert (found.c_in == 1).all()
    np.testing.assert_allclose(found.c_noise, t - 1, rtol=1e-6)
    with pytest.raises(ConfigError, match="preconditioning 'epsilon' is DDPM's, of the VP schedule"):
        resolve({"schedule": {"kind": "ve", "preconditioning": "epsilon"}})


@pytest.mark.parametrize("data", [0.5, 0.3])
@pytest.mark.parametrize(
    ("name", "kappa"),
    [
        ("paper", lambda sigma, data: 0.01 / sigma),
        ("linear", lambda sigma, data: data / (sigma + data)),
        ("quadratic", lambda sigma, data: data**2 / (sigma**2 + data**2)),
    ],
)
def test_ve_combines_by_kappa_and_1_minus_kappa(name: Any, kappa: Any, data: float) -> None:
    t = np.arange(1.0, 1001)
    schedule = ve(preconditioning=name, sigma_data=data)
    sigma, found = schedule.sigma(t), at(schedule, t)
    np.testing.assert_allclose(found.c_skip, kappa(sigma, data), rtol=1e-6)
    np.testing.assert_allclose(found.c_out, 1 - kappa(sigma, data), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.c_in, 1 / np.sqrt(sigma**2 + data**2), rtol=1e-6)
    np.testing.assert_allclose(found.c_noise, np.log(sigma) / 4, rtol=1e-6)


def test_the_paper_s_kappa_leaves_the_lowest_level_as_it_is() -> None:
    found = at(ve(preconditioning="paper"), np.array([1.0]))
    assert found.c_skip[0] == 1 and found.c_out[0] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("data", [0.5, 0.3])
@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_edm_gives_unit_variance_input_and_target(kind: str, data: float) -> None:
    """For x_0 ~ N(0, data^2): the variance of c_in x_t, and of (x_0 - c_skip x_t) / c_out, the F for which f = x_0."""
    schedule = {"vp": vp, "ve": ve}[kind](sigma_data=data)
    t = schedule.levels(40)[:-1] if kind == "vp" else schedule.levels(40)  # VP's t = T: below
    a = Coefficients(*schedule.coefficients(t).astype(np.float64))
    variance = (a.alpha * data) ** 2 + a.sigma**2
    np.testing.assert_allclose(a.c_in**2 * variance, 1, rtol=2e-6)
    target = ((1 - a.c_skip * a.alpha) * data) ** 2 + (a.c_skip * a.sigma) ** 2
    np.testing.assert_allclose(target / a.c_out**2, 1, rtol=2e-3)  # c_out^2 is ~1e-4, the float32 error of c_skip ~1e-7
    assert (a.c_skip * a.sigma * a.alpha * data >= 0).all()


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_edm_minimizes_the_contribution_of_the_network(kind: str) -> None:
    """Karras et al. 2022, appendix B.6: of all c_skip, the chosen one has the smallest c_out for a unit target."""
    schedule = {"vp": vp, "ve": ve}[kind]()
    a = Coefficients(*schedule.coefficients(schedule.levels(20)[:-1]).astype(np.float64))

    def share(skip: Any) -> Any:
        return np.hypot((1 - skip * a.alpha) * 0.5, skip * a.sigma)

    assert (share(a.c_skip * 1.01) > share(a.c_skip)).all() and (share(a.c_skip * 0.99) > share(a.c_skip)).all()


def test_coefficients_are_finite_at_every_step_of_the_paper() -> None:
    for schedule in (vp(), ve(), vp(preconditioning="paper"), ve(preconditioning="paper")):
        found = schedule.coefficients(np.arange(1.0, schedule.last + 1))
        assert found.dtype == np.float32 and np.isfinite(found).all()


def test_at_the_last_step_of_vp_no_image_is_left_and_the_edm_input_is_unit_noise() -> None:
    found = at(vp(), np.array([8000.0]))
    assert found.sigma[0] == 1 and found.alpha[0] < 1e-18
    assert found.c_in[0] == pytest.approx(1, rel=1e-6)
    assert found.c_skip[0] == pytest.approx(0, abs=1e-15)
    assert found.c_out[0] == pytest.approx(0.5, rel=1e-6)


@BOTH
@pytest.mark.parametrize("count", [1, 2, 8, 33, 128])
def test_levels_increase_from_the_first_step_to_the_last(schedule: NoiseSchedule, count: int) -> None:
    levels = schedule.levels(count)
    assert len(levels) == count + 1
    assert levels[0] == 1 and levels[-1] == schedule.last
    assert (np.diff(levels) > 0).all()


@BOTH
def test_levels_are_nested(schedule: NoiseSchedule) -> None:
    for count in (1, 4, 8, 16, 32, 64):
        np.testing.assert_allclose(schedule.levels(count), schedule.levels(2 * count)[::2], rtol=1e-9)
        np.testing.assert_allclose(schedule.levels(count), schedule.levels(3 * count)[::3], rtol=1e-9)


@BOTH
def test_levels_are_spaced_as_karras(schedule: NoiseSchedule) -> None:
    """Eq. 5 of Karras et al. 2022, in increasing order. The last VP level is T, whose sigma is above all levels."""
    low, high = float(schedule.sigma(np.array(1.0))), min(SIGMA_HIGHEST, float(schedule.sigma(np.array(schedule.last))))
    expected = [(high ** (1 / 7) + k / 16 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for k in range(16, -1, -1)]
    found = schedule.sigma(schedule.levels(16))
    tolerance = 1e-9 if schedule.config.kind == "ve" else 1e-4  # VP: alpha_bar is interpolated between steps
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=tolerance)


def test_levels_approach_the_geometric_schedule_as_rho_grows() -> None:
    geometric = np.geomspace(0.01, 50, 33)
    gaps = []
    for rho in (7.0, 100.0, 10_000.0):
        schedule = ve(rho=rho)
        gaps.append(np.abs(np.log(schedule.sigma(schedule.levels(32)) / geometric)).max())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.01


@BOTH
def test_time_inverts_sigma(schedule: NoiseSchedule) -> None:
    t = np.concatenate([np.linspace(1, schedule.last, 999), np.arange(1.0, 50)])
    np.testing.assert_allclose(schedule.time(schedule.sigma(t)), t, rtol=1e-7)
    sigma = np.geomspace(schedule.sigma(np.array(1.0)), 49, 500)
    np.testing.assert_allclose(schedule.sigma(schedule.time(sigma)), sigma, rtol=1e-7)


@BOTH
def test_time_stays_within_1_and_t(schedule: NoiseSchedule) -> None:
    assert schedule.time(np.array([1e-6, 1e30])).tolist() == [1, schedule.last]


@BOTH
def test_noise_grows_with_time(schedule: NoiseSchedule) -> None:
    t = np.linspace(1, schedule.last, 5000)
    assert (np.diff(schedule.sigma(t)) > 0).all()
    assert (np.diff(schedule.signal(t)) <= 0).all()


@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_vp_refuses_the_kappas_of_ve(name: str) -> None:
    with pytest.raises(ConfigError, match=f"preconditioning '{name}' is a kappa of the VE schedule"):
        resolve({"schedule": {"kind": "vp", "preconditioning": name}})
