"""Algorithm 1 as printed: uniform times, new noise at every visit, and the state as condition and target."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import nn

from udddm import objectives, rng
from udddm.config import resolve
from udddm.diffusion.schedule import Coefficients, NoiseSchedule
from udddm.diffusion.schedule import build as build_schedule
from udddm.objectives.base import Visits
from udddm.objectives.loss import visit_loss
from udddm.objectives.uddm import UDDM

SHAPE = (1, 4, 4)
SEED, C = 11, 0.00015


def algorithm(timesteps: int = 20, kind: str = "ve") -> tuple[UDDM, NoiseSchedule]:
    config = resolve(
        {
            "seed": SEED,
            "schedule": {"kind": kind, "timesteps": timesteps},
            "objective": {"name": "uddm", "huber_c": C},
        }
    )
    schedule = build_schedule(config.schedule)
    chosen = objectives.build(config, schedule, 10, (1, 4, 4))
    assert isinstance(chosen, UDDM)
    return chosen, schedule


def times(visits: Visits, schedule: NoiseSchedule) -> np.ndarray:
    """The integers t of a plan, computed from the noise levels passed to the device."""
    sigma = visits.coefficients[1].double() / visits.coefficients[0].double()
    t = schedule.time(sigma.numpy())
    np.testing.assert_allclose(t, t.round(), atol=0.01)
    return t.round().astype(int)


class Network(nn.Module):
    """Depends on all of its inputs, so that a wrong input is detected."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.conditions: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, level: torch.Tensor, condition: torch.Tensor, labels: object) -> torch.Tensor:
        self.conditions.append(condition)
        return torch.tanh(self.weight * x + 0.3 * condition + level[:, None, None, None])


def test_times_are_uniform_on_1_to_t() -> None:
    for kind in ("ve", "vp"):
        chosen, schedule = algorithm(20, kind)
        drawn = np.concatenate([times(chosen.plan(np.arange(2000), epoch), schedule) for epoch in range(10)])
        assert drawn.min() == 1 and drawn.max() == 20
        assert stats.chisquare(np.bincount(drawn, minlength=21)[1:]).pvalue > 1e-4


def test_times_of_successive_visits_are_independent() -> None:
    chosen, schedule = algorithm(20)
    first, second = (times(chosen.plan(np.arange(20_000), epoch), schedule) for epoch in (4, 5))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(20_000)


def test_noise_is_new_at_every_visit() -> None:
    chosen, _ = algorithm()
    keys = torch.cat([chosen.plan(np.arange(100), epoch).noise_key for epoch in range(20)])
    assert len(keys.unique()) == 2000


def test_x0_weight_is_1_over_n_plus_1_where_n_is_the_epoch() -> None:
    chosen, _ = algorithm()
    for epoch in (0, 1, 9, 399):
        visits = chosen.plan(np.arange(3), epoch)
        np.testing.assert_allclose(visits.x0_weight, np.full(3, 1 / (epoch + 1)), rtol=1e-7)
        assert visits.weight.tolist() == [1, 1, 1]
        assert len(visits.teacher_rows) == 0


def test_a_plan_is_a_pure_function_of_each_sample() -> None:
    chosen, _ = algorithm()
    ids = np.random.default_rng(0).permutation(50)
    whole, part = chosen.plan(ids, 3), algorithm()[0].plan(ids[10:20], 3)
    assert torch.equal(whole.coefficients[:, 10:20], part.coefficients)
    assert torch.equal(whole.noise_key[10:20], part.noise_key)
    assert torch.equal(whole.x0_weight[10:20], part.x0_weight)


def test_a_visit_equals_the_three_lines_of_the_algorithm() -> None:
    chosen, _ = algorithm()
    x0, state = (torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    visits, network = chosen.plan(np.arange(6), 2), Network()
    losses, new_state = visit_loss(network, x0, state, visits)
    a = Coefficients(*visits.coefficients)
    eps = rng.normal(visits.noise_key, SHAPE)
    for i in range(6):
        xt = a.alpha[i] * x0[i] + a.sigma[i] * eps[i]
        f = a.c_skip[i] * xt + a.c_out[i] * torch.tanh(0.7 * a.c_in[i] * xt + 0.3 * state[i] + a.c_noise[i])
        d = [float(((f - y).double().square().sum() + C**2).sqrt() - C) for y in (x0[i], state[i])]
        torch.testing.assert_close(new_state[i], f.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(losses[i].item(), d[0] / 3 + d[1] * 2 / 3, rtol=1e-5)
    assert len(network.conditions) == 1 and torch.equal(network.conditions[0], state)


def test_the_new_state_is_detached() -> None:
    chosen, _ = algorithm()
    x0, state = torch.zeros(3, *SHAPE), torch.ones(3, *SHAPE)
    losses, new_state = visit_loss(Network(), x0, state, chosen.plan(np.arange(3), 1))
    assert losses.requires_grad and not new_state.requires_grad
