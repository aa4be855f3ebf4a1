"""A short run of benchmarks/quality/gaussian.py: the chain objective finds a solution known in closed form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from udddm.config import ScheduleConfig
from udddm.diffusion.schedule import Coefficients, build


@pytest.fixture(scope="module")
def gaussian() -> ModuleType:
    """The benchmark, which is a script outside of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "quality" / "gaussian.py"
    spec = importlib.util.spec_from_file_location("benchmark_gaussian", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_the_exact_solution_solves_the_probability_flow_ode(gaussian: ModuleType, kind: str) -> None:
    """dx/dsigma = (x - E[x_0 | x]) / sigma for x = x_t / signal (Karras et al. 2022), by Runge-Kutta steps to x_0."""
    schedule = build(ScheduleConfig(kind=kind, timesteps=gaussian.TIMESTEPS[kind]))
    t = schedule.time(np.array([20.0]))
    at = Coefficients(*torch.from_numpy(schedule.coefficients(t)))
    sigma = float(schedule.sigma(t)[0])
    mean, variance = gaussian.MEAN.double(), gaussian.SPREAD**2
    x = mean + sigma * torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = x.clone()

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return (x - mean) * sigma / (variance + sigma**2)  # (x - posterior mean) / sigma

    for high, low in zip(grid := np.geomspace(sigma, 1e-4, 400), grid[1:], strict=False):
        step = low - high
        k1 = slope(x, high)
        k2 = slope(x + step / 2 * k1, high + step / 2)
        k3 = slope(x + step / 2 * k2, high + step / 2)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + step * k3, low))
    xt = at.alpha[:, None, None, None] * start
    torch.testing.assert_close(gaussian.exact(xt.float(), at).double(), x, rtol=1e-4, atol=1e-4)


def test_the_bias_of_a_chain_falls_as_1_over_its_levels(gaussian: ModuleType) -> None:
    """It also equals the result of iterating the conditional expectation by regression on samples."""
    schedule = build(ScheduleConfig())
    means = [gaussian.bias(schedule.sigma(schedule.levels(m))).mean() for m in (16, 32, 64, 128)]
    ratios = np.divide(means[:-1], means[1:])
    assert (np.diff(means) < 0).all() and ratios[-1] == pytest.approx(2, abs=0.1)
    rng = np.random.default_rng(0)
    x0, eps = gaussian.SPREAD * rng.standard_normal(200_000), rng.standard_normal(200_000)
    target, found = x0, []
    sigmas = schedule.sigma(schedule.levels(8))
    for sigma in sigmas:
        x = x0 + sigma * eps
        target = x * (x @ target) / (x @ x)
        exact = x * gaussian.SPREAD / np.hypot(gaussian.SPREAD, sigma)
        found.append(np.sqrt(np.mean((target - exact) ** 2)) / gaussian.SPREAD)
    np.testing.assert_allclose(gaussian.bias(sigmas), found, atol=0.005)


def test_the_bias_of_refined_pairs_is_that_of_regression_on_samples(
    gaussian: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refined visits are of f(x_0 + sigma eps) with the same eps; f and its teacher are fitted level after level."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "quality")
    refined = importlib.import_module("gaussian_refined")
    schedule, random = build(ScheduleConfig()), np.random.default_rng(0)
    sigmas = schedule.sigma(schedule.levels(12))[1:]
    x0, eps = gaussian.SPREAD * random.standard_normal(40_000), random.standard_normal(40_000)
    g, below, found = 1.0, 0.0, []
    for sigma in sigmas:
        teacher, share = g, 0.5 if sigma > 0.8 else 0.0
        for _ in range(25):
            b = g * (x0 + sigma * eps)
            inputs = np.stack([x0 + sigma * eps, b + sigma * eps])
            targets = teacher * np.stack([x0 + below * eps, b + below * eps])
            weights = np.array([[1 - share], [share]])
            g = float((weights * inputs * targets).sum() / (weights * inputs**2).sum())
        below = sigma
        found.append(g * np.hypot(gaussian.SPREAD, sigma) / gaussian.SPREAD - 1)
    np.testing.assert_allclose(refined.fixed_point(sigmas, 0.5, 0.8), found, atol=0.01)
    plain = refined.fixed_point(sigmas, 0.0, 0.8)
    np.testing.assert_allclose(np.abs(plain), gaussian.bias(sigmas), atol=1e-12)
    fine = schedule.sigma(schedule.levels(4000))[1:]
    assert 0.1 < refined.fixed_point(fine, 0.5, 0.8)[-1] < 0.5 * gaussian.SPREAD / 0.8  # p s / above
    assert abs(refined.fixed_point(fine, 0.0, 0.8)[-1]) < 0.001


def test_a_short_run_is_within_15_percent_of_the_exact_solution(gaussian: ModuleType) -> None:
    options = ["--levels=16", "--steps=2500", "--batch=256", "--samples=16384", "--algorithm-1-steps=0", "--width=48"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = gaussian.run("ve", gaussian.parser().parse_args(options))
    finally:
        torch.set_num_threads(threads)
    assert result["chain_mean"] < 0.15
    assert max(result["chain"]) < 0.25
    assert np.mean(np.abs(np.subtract(result["chain"], result["bias"]))) < 0.06  # it converges to its own fixed point
    assert "ve" in gaussian.table({"ve": result})
