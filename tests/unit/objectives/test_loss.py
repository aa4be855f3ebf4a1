"""Eq. 3 and Eq. 4, compared with float64 arithmetic on single numbers, and f = a(t) x_t + b(t) F."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from udddm import objectives
from udddm.config import ScheduleConfig, load_config
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients, build
from udddm.objectives.base import Visits
from udddm.objectives.loss import adaptive_loss, pseudo_huber
from udddm.objectives.refined import Refined

SHAPE = (3, 4, 5)


def images(count: int, *seeds: int) -> list[torch.Tensor]:
    return [torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def naive_distance(x: torch.Tensor, y: torch.Tensor, c: float) -> float:
    """Eq. 4 for one image, element by element."""
    total = 0.0
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        total += (a - b) ** 2
    return math.sqrt(total + c**2) - c


@pytest.mark.parametrize("c", [0.00014, 0.00015, 0.03, 10.0])
@pytest.mark.parametrize("apart", [1e-6, 1e-3, 1.0, 100.0])
def test_distance_is_equation_4(c: float, apart: float) -> None:
    x, step = images(6, 0, 1)
    y = x + apart * step
    expected = [naive_distance(a, b, c) for a, b in zip(x, y, strict=True)]
    # Float32 rounds x itself to 1e-7 and sqrt(. + c^2) to 1e-7 of its value.
    np.testing.assert_allclose(pseudo_huber(x, y, c).numpy(), expected, rtol=2e-5, atol=3e-7 * c)


def test_distance_uses_one_norm_per_image() -> None:
    """The norm of d equal differences is sqrt(d) times one of them; norms per element would sum or average them."""
    x = torch.zeros(1, *SHAPE)
    d = math.prod(SHAPE)
    assert float(pseudo_huber(x, x + 3.0, 1e-4)) == pytest.approx(3 * math.sqrt(d), rel=1e-4)


def test_distance_of_equal_images_is_0_with_gradient_0() -> None:
    x = torch.randn(2, *SHAPE, requires_grad=True)
    distance = pseudo_huber(x, x.detach().clone(), 0.00014)
    distance.sum().backward()
    assert distance.tolist() == [0, 0] and x.grad is not None and not x.grad.any()


def test_gradient_of_the_distance_has_at_most_unit_norm() -> None:
    """The gradient (x - y) / sqrt(||x - y||^2 + c^2) has a norm near 1 for large distances, and is linear for small."""
    for apart, force in [(100.0, 1.0), (1e-6, 1e-6 * math.sqrt(math.prod(SHAPE)) / 0.01)]:
        x = torch.zeros(1, *SHAPE, requires_grad=True)
        pseudo_huber(x, torch.full((1, *SHAPE), apart), 0.01).sum().backward()
        assert x.grad is not None and float(x.grad.norm()) == pytest.approx(force, rel=1e-3)


@pytest.mark.parametrize("name", ["ict", "ect", "chain"])
def test_c_of_0_is_the_distance_itself(name: str) -> None:
    config = load_config("digits", [f"objective.name={name}", "objective.huber_c=0", "objective.refined.share=0"])
    objective = objectives.build(config, build(config.schedule), 100.0, SHAPE)
    c = objective.plan(np.arange(4), 90).huber_c
    x = torch.randn(4, *SHAPE, requires_grad=True)
    y = x.detach() + torch.tensor([0.0, 1e-6, 1.0, 100.0])[:, None, None, None]
    distance = pseudo_huber(x, y, c)
    torch.testing.assert_close(distance, (x - y).flatten(1).norm(dim=1))
    distance.sum().backward()
    norms = x.grad.flatten(1).norm(dim=1)  # type: ignore[union-attr]
    torch.testing.assert_close(norms, torch.tensor([0.0, 1.0, 1.0, 1.0]))


def test_loss_is_equation_3() -> None:
    output, x0, state = images(5, 0, 1, 2)
    visits = [0, 1, 2, 9, 999]
    x0_weight = torch.tensor([1 / (n + 1) for n in visits])
    expected = [
        1 / (n + 1) * naive_distance(f, x, 0.00014) + (1 - 1 / (n + 1)) * naive_distance(f, s, 0.00014)
        for n, f, x, s in zip(visits, output, x0, state, strict=True)
    ]
    np.testing.assert_allclose(adaptive_loss(output, x0, state, x0_weight, 0.00014).numpy(), expected, rtol=1e-5)


def test_at_the_first_visit_the_state_does_not_matter() -> None:
    output, x0, state, other = images(2, 0, 1, 2, 3)
    x0_weight = torch.ones(2)
    assert torch.equal(
        adaptive_loss(output, x0, state, x0_weight, 0.1), adaptive_loss(output, x0, other, x0_weight, 0.1)
    )


def test_each_image_has_its_own_loss() -> None:
    output, x0, state = images(7, 0, 1, 2)
    x0_weight = torch.linspace(0, 1, 7)
    whole = adaptive_loss(output, x0, state, x0_weight, 0.03)
    assert whole.shape == (7,)
    alone = torch.cat([adaptive_loss(*(v[i : i + 1] for v in (output, x0, state, x0_weight)), 0.03) for i in range(7)])
    torch.testing.assert_close(whole, alone)


class Recorder(nn.Module):
    """Returns a constant and records its inputs."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, *asked: object) -> torch.Tensor:
        self.asked.append(asked)
        return self.answer


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_f_combines_x_t_and_the_network_by_a_and_b(kind: str) -> None:
    schedule = build(ScheduleConfig(kind=kind, timesteps=100))
    at = Coefficients(*torch.from_numpy(schedule.coefficients(np.array([1.0, 50.0, 99.0]))))
    xt, answer, condition = images(3, 0, 1, 2)
    labels = torch.arange(3)
    network = Recorder(answer.half())
    output = denoise(network, xt, at, condition, labels)
    assert output.dtype == torch.float32
    for i in range(3):
        expected = at.c_skip[i] * xt[i] + at.c_out[i] * answer[i].half().float()
        torch.testing.assert_close(output[i], expected)
    [(seen, embedding, image, classes)] = network.asked
    torch.testing.assert_close(seen, torch.stack([at.c_in[i] * xt[i] for i in range(3)]))
    assert embedding is at.c_noise and image is condition and classes is labels


def test_add_noise_is_alpha_times_image_plus_sigma_times_eps() -> None:
    schedule = build(ScheduleConfig(kind="vp", timesteps=100))
    at = Coefficients(*torch.from_numpy(schedule.coefficients(np.array([1.0, 50.0]))))
    x0, eps = images(2, 0, 1)
    for i, noisy in enumerate(add_noise(x0, eps, at)):
        torch.testing.assert_close(noisy, at.alpha[i] * x0[i] + at.sigma[i] * eps[i])


def test_visits_move_to_a_device_with_all_fields() -> None:
    refined = Refined(torch.tensor([True]), torch.zeros(1, 16), 0.5, "network")
    some = Visits(*(torch.tensor([i]) for i in range(8)), refined=refined)
    moved = some.to(torch.device("meta"))
    assert moved.condition == some.condition == "noise"
    assert moved.refined is not None and (moved.refined.min_sharpness, moved.refined.source) == (0.5, "network")
    values = [*vars(moved).values(), *vars(moved.refined).values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10 and all(value.device.type == "meta" for value in tensors)
