"""Guidance that is trained in: its solution on Gaussian data, the visits that keep and drop their label, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import objectives, rng
from udddm.config import RunConfig, resolve
from udddm.diffusion.denoise import add_noise, append_dims, denoise
from udddm.diffusion.schedule import Coefficients, build
from udddm.errors import ConfigError
from udddm.objectives import LabelDropout
from udddm.objectives.base import Objective, Visits
from udddm.objectives.loss import Teacher, pseudo_huber, visit_loss

SHAPE = (1, 2, 2)
IDS = np.arange(400)
KINDS: dict[str, dict[str, Any]] = {
    "edm": {"name": "edm"},
    "ict": {"name": "ict", "ict": {"s0": 10, "s1": 40}},
    "ect": {"name": "ect", "ect": {"stages": 3}, "pretrain": 0.0},
}
EVERY = pytest.mark.parametrize("kind", list(KINDS))
CONSISTENCY = pytest.mark.parametrize("kind", ["ict", "ect"])


def config(kind: str = "ect", weight: float = 2.5, share: float = 0.3, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "seed": 3,
        "objective": {**KINDS.get(kind, {"name": kind}), "guidance": weight},
        "network": {"condition": "none", "classes": 10, "label_dropout": share},
        "schedule": {"kind": "ve", "preconditioning": "edm"},
    }
    for key, values in sections.items():
        tree[key] = {**tree.get(key, {}), **values}
    return resolve(tree)


def made(given: RunConfig, epochs: float = 60) -> Objective:
    return objectives.build(given, build(given.schedule), epochs, SHAPE)


def dropped(given: RunConfig, visits: Visits) -> torch.Tensor:
    return torch.from_numpy(LabelDropout.of(given).drops(visits))


def batch(count: int = len(IDS)) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *SHAPE, generator=g), torch.randint(10, (count,), generator=g)


class Network(nn.Module):
    """Depends on all of its inputs, draws a dropout mask, and counts its calls."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.drop, self.calls = nn.Dropout(drop), 0

    def forward(self, x: torch.Tensor, level: torch.Tensor, condition: object, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.drop(torch.tanh(self.weight * x + append_dims(level + 0.1 * labels)))


# The solution. Every class is N(m, s^2) and all images together are N(0, S^2), so that D_c and D are linear in x.

MEAN, DEVIATION, OVERALL = 1.2, 0.4, 1.5
SAMPLES = 100_000


def denoiser(x: torch.Tensor, sigma: torch.Tensor, weight: float) -> torch.Tensor:
    """D + w (D_c - D)."""
    own, every = DEVIATION**2, OVERALL**2
    mean = every / (every + sigma**2) * x
    return mean + weight * (MEAN + own / (own + sigma**2) * (x - MEAN) - mean)


def endpoint(x: torch.Tensor, sigma: torch.Tensor, weight: float) -> torch.Tensor:
    """Where the probability flow of D_w, dx/dsigma = (x - D_w) / sigma, ends at sigma = 0.

    The homogeneous equation is solved by h = (s^2 + sigma^2)^(w/2) (S^2 + sigma^2)^((1-w)/2); its inhomogeneity is
    -w m sigma / (s^2 + sigma^2), whose integral is taken by the trapezoidal rule.
    """

    def h(at: np.ndarray) -> np.ndarray:
        return (DEVIATION**2 + at**2) ** (weight / 2) * (OVERALL**2 + at**2) ** ((1 - weight) / 2)

    grid = np.linspace(0, 100 ** (1 / 3), 20_001) ** 3
    slope = weight * MEAN * grid / (DEVIATION**2 + grid**2) / h(grid)
    integral = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (slope[1:] + slope[:-1]) / 2)])
    at = sigma.numpy().ravel()
    offset = h(np.zeros(1)) * np.interp(at, grid, integral)
    scale, shift = (torch.from_numpy(each).view(sigma.shape) for each in (h(np.zeros(1)) / h(at), offset))
    return scale * x + shift


class Solution(nn.Module):
    """Returns `solution` for labels and the denoiser of all images without one, plus parameters that are zero."""

    def __init__(self, solution: Any, weight: float) -> None:
        super().__init__()
        self.solution, self.guidance = solution, weight
        self.more = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor, level: torch.Tensor, condition: object, labels: torch.Tensor) -> torch.Tensor:
        sigma = append_dims((4 * level).double().exp())
        data = 0.5
        norm = (sigma**2 + data**2).sqrt()
        x = x.double()
        xt = x * norm
        own, none = self.solution(xt, sigma, self.guidance), denoiser(xt, sigma, 0.0)
        found = torch.where(append_dims(labels == 10), none, own + self.more[0] + self.more[1] * x)
        return ((found - data**2 / norm**2 * xt) / (sigma * data / norm)).float()


@EVERY
@pytest.mark.parametrize("weight", [1.5, 3.0])
def test_the_solution_is_the_guided_denoiser_or_the_end_of_the_guided_flow(kind: str, weight: float) -> None:
    """The expected gradient is zero at the guided solution, and not at that of another weight."""
    small_gaps = {"ict": {"s0": 640, "s1": 640}, "ect": {"stages": 1, "q": 64, "k": 0}}
    span = {"sigma_min": 0.02, "sigma_max": 20.0}
    given = config(kind, weight, objective={"huber_c": 1e4, **small_gaps}, schedule=span)
    visits = made(given).plan(np.arange(SAMPLES), 50)
    labels = LabelDropout.of(given)(torch.zeros(SAMPLES, dtype=torch.int64), visits)
    x0 = MEAN + DEVIATION * torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(1))
    sigma = visits.coefficients[1]
    seen = ((labels != 10) & (sigma > 0.2) & (sigma < 5)).float() / sigma

    def gradient(of: float) -> torch.Tensor:
        network = Solution(denoiser if kind == "edm" else endpoint, of)
        losses, _ = visit_loss(network, x0, x0, visits, labels)
        (losses * seen).sum().backward()
        assert network.more.grad is not None
        return network.more.grad

    right, plain, more = (gradient(of).norm() for of in (weight, 1.0, 2 * weight - 1))
    assert right < 0.1 * min(plain, more), (right, plain, more)


# What a visit trains.


@EVERY
@pytest.mark.parametrize("schedule", ["ve", "vp"])
def test_the_loss_of_a_visit(kind: str, schedule: str) -> None:
    """With a label, x_0 and the image of the teacher move away from the estimate without one; without, x_0 is it."""
    given = config(kind, schedule={"kind": schedule})
    visits, network = made(given).plan(IDS, 33), Network()
    x0, classes = batch()
    labels = LabelDropout.of(given)(classes, visits)
    losses, after = visit_loss(network, x0, torch.zeros_like(x0), visits, labels)
    kept = append_dims(~dropped(given, visits))
    eps, at = rng.normal(visits.noise_key, SHAPE), Coefficients(*visits.coefficients)
    below, taught = Coefficients(*visits.teacher_coefficients), visits.teacher_rows
    with torch.no_grad():
        xt = add_noise(x0, eps, at)
        away = torch.where(kept, 1.5 * (x0 - denoise(network, xt, at, None, torch.full_like(labels, 10))), 0)
        target = x0 + away
        if kind != "edm":
            step = 1 - append_dims(below.sigma / below.alpha / (at.sigma / at.alpha)[taught])
            image = add_noise(x0[taught] + step * away[taught], eps[taught], below)
            target[taught] = denoise(network, image, below, None, labels[taught])
            assert len(taught) > 80 and not dropped(given, visits)[taught].any()
        output = denoise(network, xt, at, None, labels)
    assert torch.equal(after, output)
    torch.testing.assert_close(losses, visits.weight * pseudo_huber(output, target, visits.huber_c))


@CONSISTENCY
def test_visits_without_a_label_train_a_mean(kind: str) -> None:
    """Their loss is a square: its gradient is proportional to the error, and as large as that of the other visits."""
    given = config(kind)
    visits = made(given).plan(IDS, 33)
    none, sigma = dropped(given, visits), visits.coefficients[1]
    assert 80 < none.sum() < 160
    expected = 2 * (0.5 * sigma / (0.25 + sigma**2).sqrt())  # of the norm over 4 values
    plain = made(config(kind, 1.0)).plan(IDS, 33)
    for factor in (0.1, 1.0, 3.0):
        output = torch.zeros(len(IDS), *SHAPE, requires_grad=True)
        error = append_dims(factor * expected / 2).expand(-1, *SHAPE)
        (visits.weight * pseudo_huber(output, error, visits.huber_c)).sum().backward()
        assert output.grad is not None
        gradient = output.grad.flatten(1).norm(dim=1)
        torch.testing.assert_close(gradient[none], (factor * plain.weight)[none])
    assert torch.equal(visits.weight[~none], plain.weight[~none])
    assert torch.equal(visits.huber_c[~none], plain.huber_c[~none])


def test_a_denoiser_trains_visits_without_a_label_as_it_does_without_guidance() -> None:
    given, plain = config("edm"), config("edm", 1.0)
    x0, classes = batch()
    found = []
    for each in (given, plain):
        visits = made(each).plan(IDS, 3)
        labels = LabelDropout.of(each)(classes, visits)
        found.append(visit_loss(Network(), x0, torch.zeros_like(x0), visits, labels)[0])
    none = dropped(given, made(given).plan(IDS, 3))
    assert torch.equal(found[0][none], found[1][none])
    assert not torch.isclose(found[0][~none], found[1][~none]).any()


def test_the_gradient_of_a_denoiser_is_that_of_model_guidance() -> None:
    """Its target is x_0 + (1 - 1/w) (f - D), with f the output without gradient (Tang et al. 2025)."""
    given, network = config("edm"), Network()
    x0, classes = batch()
    visits, plain = (made(each).plan(IDS, 3) for each in (given, config("edm", 1.0)))
    labels = LabelDropout.of(given)(classes, visits)
    losses, output = visit_loss(network, x0, torch.zeros_like(x0), visits, labels)
    (found,) = torch.autograd.grad(losses.sum(), network.weight)
    at = Coefficients(*visits.coefficients)
    xt = add_noise(x0, rng.normal(visits.noise_key, SHAPE), at)
    mean = denoise(network, xt, at, None, torch.full_like(labels, 10)).detach()
    target = torch.where(append_dims(labels == 10), x0, x0 + (1 - 1 / 2.5) * (output - mean))
    expected = (plain.weight * pseudo_huber(denoise(network, xt, at, None, labels), target, plain.huber_c)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, network.weight)[0], rtol=1e-4, atol=1e-4)


@EVERY
def test_a_weight_of_1_changes_no_plan_and_costs_nothing(kind: str) -> None:
    tree = config(kind, 1.0).model_dump(mode="json")
    del tree["objective"]["guidance"]  # as in runs that began before the key existed
    before = resolve(tree)
    assert before.fingerprint() == config(kind, 1.0).fingerprint() != config(kind).fingerprint()
    x0, labels = batch()
    calls = []
    for given in (before, config(kind)):
        network, visits = Network(), made(given).plan(IDS, 33)
        visit_loss(network, x0, torch.zeros_like(x0), visits, labels)
        calls.append(network.calls)
        assert (visits.guidance is None) == (given is before)
        assert Teacher().evaluated(visits) == len(IDS) * (network.calls - 1)
    assert calls[1] == calls[0] + 1


@EVERY
def test_every_call_of_a_step_drops_the_same_units(kind: str) -> None:
    """The call that trains draws the masks that it would draw alone."""
    x0, labels = batch()
    outputs = []
    for weight in (1.0, 2.0):
        torch.manual_seed(5)
        visits = made(config(kind, weight)).plan(IDS, 33)
        outputs.append(visit_loss(Network(drop=0.5), x0, torch.zeros_like(x0), visits, labels)[1])
    assert torch.equal(*outputs)


@EVERY
def test_a_plan_is_a_pure_function_of_each_sample(kind: str) -> None:
    one, again, some = made(config(kind)), made(config(kind)), IDS[np.array([7, 3, 399, 40])]
    whole, part = one.plan(IDS, 20), again.plan(some, 20)
    assert whole.guidance is not None and part.guidance is not None
    assert torch.equal(whole.guidance[:, some], part.guidance)
    assert torch.equal(whole.weight[some], part.weight)


@CONSISTENCY
@pytest.mark.parametrize("source", ["store", "network"])
def test_refined_visits_are_not_guided_again(kind: str, source: str) -> None:
    """Their image is an estimate, which is guided already. Visits without a label, which are means, are not refined."""
    refined = {"refined": {"share": 0.5, "above": 0.0, "source": source}}
    given, plain = (config(kind, weight, objective=refined) for weight in (2.5, 1.0))
    x0, classes = batch()
    state, found = 0.5 * x0.flip(0), []
    for each in (given, plain):
        visits = made(each).plan(IDS, 33)
        labels = LabelDropout.of(each)(classes, visits)
        found.append(visit_loss(Network(), x0, state, visits, labels)[0])
    visits = made(given).plan(IDS, 33)
    assert visits.refined is not None
    none, used = dropped(given, visits), visits.refined.rows
    assert 40 < used.sum() < 200 and not (used & none).any()
    torch.testing.assert_close(found[0][used], found[1][used])
    assert not torch.isclose(found[0][~used], found[1][~used]).any()


def test_pretraining_is_guided_too() -> None:
    one = made(config("ect", objective={"pretrain": 0.5}))
    for epoch in (3, 40):
        visits = one.plan(IDS, epoch)
        assert visits.guidance is not None and (visits.guidance[0] == 1.5).sum() > 200


# Refusals.


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"network": {"classes": 0, "label_dropout": 0.0}}, r"objective.guidance 2.5: .*network.classes is 0"),
        ({"network": {"label_dropout": 0.0}}, r"objective.guidance 2.5: .*network.label_dropout"),
        ({"objective": {"guidance": 0.5}}, r"objective.guidance.*greater than or equal to 1"),
        ({"objective": {"guidance": float("inf")}}, r"objective.guidance.*finite"),
        ({"sample": {"guidance": 2.0}}, r"sample.guidance 2: .*objective.guidance 2.5.*leave it at 1"),
    ],
)
def test_a_configuration_that_cannot_be_guided_is_one_error(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**tree)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "chain"}, r"objective.guidance 2.5: objective.name=chain .*ict, ect or edm"),
        ({"name": "uddm"}, r"objective.guidance 2.5: objective.name=uddm"),
        ({"name": "ect", "ect": {"length": 2}}, r"objective.guidance 2.5: .*objective.ect.length to 1"),
        ({"name": "ict", "refined": {"share": 0.5, "use": "condition"}}, r"objective.refined.use=condition; set it to"),
    ],
)
def test_an_objective_that_cannot_be_guided_is_one_error(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(config(objective=objective, network={"condition": "channels"}))


def test_a_guided_denoiser_may_be_guided_further() -> None:
    """Its estimate without a label is that of a denoiser trained without guidance."""
    config("edm").check_guidance(2.0, "--guidance")
    with pytest.raises(ConfigError, match=r"--guidance 0: .*objective.guidance"):
        config("ict").check_guidance(0.0, "--guidance")
