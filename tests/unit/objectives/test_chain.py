"""The chain objective: the position of a visit in its chain, its target, and the inputs it depends on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from udddm import rng
from udddm.config import ChainConfig, ScheduleConfig
from udddm.diffusion.schedule import Coefficients, build
from udddm.objectives.base import Visits
from udddm.objectives.chain import Chain
from udddm.objectives.loss import pseudo_huber, visit_loss

SHAPE = (1, 4, 4)
SEED, C = 5, 0.03
IDS = np.arange(300)


def chain(
    length: int | str = 2,
    levels: int = 8,
    *,
    seed: int = SEED,
    kind: str = "ve",
    conditioned: bool = False,
    **changes: Any,
) -> Chain:
    """A chain of 40 epochs, with one stage of `levels` unless `stages` are given."""
    settings: dict[str, Any] = {"length": length, "stages": [{"start": 0, "levels": levels}]} | changes
    schedule = build(ScheduleConfig(kind=kind, timesteps=1000))
    return Chain(schedule, ChainConfig.model_validate(settings), C, seed, 40, conditioned)


def growing(length: int | str) -> Chain:
    """M is 4, then 8 from epoch 10, then 16 from epoch 25 on."""
    stages = [{"start": 0, "levels": 4}, {"start": 0.25, "levels": 8}, {"start": 0.61, "levels": 16}]
    return chain(length, stages=stages)


LENGTHS = pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 20, "trajectory"])


class Network(nn.Module):
    """Depends on all of its inputs, and records them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.calls: list[tuple[torch.Tensor, torch.Tensor | None, bool]] = []

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, condition: torch.Tensor | None, labels: object
    ) -> torch.Tensor:
        self.calls.append((x, condition, torch.is_grad_enabled()))
        given = 0 if condition is None else 0.3 * condition
        return torch.tanh(self.weight * x + given + level[:, None, None, None])


def f_at(network: nn.Module, coefficients: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """f for one sample, written out."""
    alpha, sigma, c_skip, c_out, c_in, c_noise = coefficients
    xt = alpha * x0 + sigma * eps
    with torch.no_grad():
        answer = network((c_in * xt)[None], c_noise[None], None, None)[0]
    result: torch.Tensor = c_skip * xt + c_out * answer
    return result


def same(a: Visits, b: Visits) -> bool:
    names = [field.name for field in fields(Visits) if isinstance(getattr(a, field.name), torch.Tensor)]
    return a.condition == b.condition and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def data(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


# The position of a visit in its chain.


@LENGTHS
def test_levels_are_visited_equally_often(length: int | str) -> None:
    chosen = chain(length)
    counts = sum(np.bincount(chosen.position(np.arange(4000), e)[3], minlength=9) for e in range(20, 29))
    if length == "trajectory":
        assert (counts == 4000).all()  # nine epochs are one cycle for every sample
    else:  # visits of a chain are not independent draws: allow for nine times the variance
        assert stats.chisquare(counts / 9).pvalue > 1e-4


@LENGTHS
def test_all_levels_are_present_at_any_time(length: int | str) -> None:
    chosen = chain(length)
    for epoch in range(9, 15):  # the first cycles of all trajectories start at the lowest level
        assert np.bincount(chosen.position(np.arange(2000), epoch)[3], minlength=9).min() > 150


@LENGTHS
def test_within_a_chain_the_level_increases_by_one_and_the_noise_is_the_same(length: int | str) -> None:
    chosen = growing(length)
    before = None
    increases = 0
    for epoch in range(40):
        now = (*chosen.position(IDS, epoch), chosen.plan(IDS, epoch).noise_key.numpy())
        stage, number, visit, level, key = now
        levels = chosen.config.stages[stage].levels
        assert level.min() >= 0 and level.max() <= levels
        if before is not None:
            continues = (number == before[1]) & (stage == before[0])
            assert (visit[continues] == before[2][continues] + 1).all() and (visit[~continues] == 0).all()
            assert (level[continues] == (before[3][continues] + 1) % (levels + 1)).all()
            assert (key[continues] == before[4][continues]).all()
            assert (key[~continues] != before[4][~continues]).all()
            increases += int(continues.sum())
        before = now
    assert (increases == 0) == (length == 1)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_a_chain_lasts_as_many_visits_as_configured(length: int) -> None:
    chosen = chain(length)
    keys = np.stack([chosen.plan(IDS, epoch).noise_key.numpy() for epoch in range(40)])
    for sample in range(len(IDS)):
        ends = np.flatnonzero(np.diff(keys[:, sample])) + 1
        runs = np.diff([0, *ends, 40])
        assert (runs[1:-1] == length).all() and runs[0] <= length and runs[-1] <= length
        assert len(np.unique(keys[:, sample])) == len(runs)  # and no noise is used twice


@pytest.mark.parametrize("length", [2, 3, 5, "trajectory"])
def test_chains_are_staggered(length: int | str) -> None:
    visits = 9 if length == "trajectory" else int(length)
    begins = [np.mean(chain(length).position(np.arange(3000), epoch)[2] == 0) for epoch in range(20, 24)]
    np.testing.assert_allclose(begins, 1 / visits, atol=4.5 * np.sqrt(0.25 / 3000))


def test_a_trajectory_starts_at_the_lowest_level_and_visits_every_level() -> None:
    chosen = chain("trajectory")
    positions = [chosen.position(IDS, epoch) for epoch in range(40)]
    level = np.stack([p[3] for p in positions])
    visit = np.stack([p[2] for p in positions])
    assert (level == visit).all() and (level[0] == 0).all()
    number = np.stack([p[1] for p in positions])
    for sample in range(50):
        for cycle in (1, 2):
            assert level[number[:, sample] == cycle, sample].tolist() == list(range(9))
    assert all(len(chosen.plan(IDS, epoch).teacher_rows) == 0 for epoch in range(40))


@LENGTHS
def test_the_number_of_levels_changes_only_between_chains(length: int | str) -> None:
    """A stage starts with a new chain for every sample: new noise, and no target from the previous stage."""
    chosen = growing(length)
    stages = [chosen.position(IDS, epoch)[0] for epoch in range(40)]
    starts = (np.flatnonzero(np.diff(stages)) + 1).tolist()
    assert starts == [10, 25]
    for start in starts:
        before, after = chosen.plan(IDS, start - 1), chosen.plan(IDS, start)
        assert (before.noise_key != after.noise_key).all()
        _, _, visit, level = chosen.position(IDS, start)
        assert not visit.any()
        assert after.teacher_rows.tolist() == np.flatnonzero(level > 0).tolist()


def test_samples_epochs_and_seeds_draw_differently() -> None:
    first = chain(2).plan(np.arange(1000), 7)
    assert len(first.noise_key.unique()) == 1000
    assert (chain(2, seed=6).plan(np.arange(1000), 7).noise_key != first.noise_key).all()
    levels = [chain(2, seed=s).position(np.arange(5000), 7)[3] for s in (5, 6)]
    assert abs(np.corrcoef(levels[0], levels[1])[0, 1]) < 4.5 / np.sqrt(5000)


# The plan of a visit.


@LENGTHS
def test_a_plan_is_a_pure_function_of_each_sample(length: int | str) -> None:
    chosen = growing(length)
    ids = np.random.default_rng(0).permutation(300)
    for epoch in (0, 3, 10, 24, 39):
        whole, part = chosen.plan(ids, epoch), growing(length).plan(ids[100:150], epoch)
        for name in ("noise_key", "condition_key", "x0_weight", "weight"):
            assert torch.equal(getattr(whole, name)[100:150], getattr(part, name)), name
        assert torch.equal(whole.coefficients[:, 100:150], part.coefficients)
        inside = (whole.teacher_rows >= 100) & (whole.teacher_rows < 150)
        assert torch.equal(whole.teacher_rows[inside] - 100, part.teacher_rows)
        assert torch.equal(whole.teacher_coefficients[:, inside], part.teacher_coefficients)
        assert same(chosen.plan(ids, epoch), whole)


@LENGTHS
def test_targets_are_evaluated_at_first_visits_above_the_lowest_level_only(length: int | str) -> None:
    chosen = chain(length)
    times = chosen.schedule.levels(8)
    for epoch in range(12):
        _, _, visit, level = chosen.position(IDS, epoch)
        visits = chosen.plan(IDS, epoch)
        assert visits.teacher_rows.tolist() == [i for i in range(len(IDS)) if visit[i] == 0 and level[i] > 0]
        below = chosen.schedule.coefficients(times[level[visits.teacher_rows] - 1])
        np.testing.assert_array_equal(visits.teacher_coefficients, below)
        np.testing.assert_array_equal(visits.coefficients, chosen.schedule.coefficients(times[level]))


def test_chains_of_one_visit_are_consistency_training() -> None:
    """Every target is x_0 or is evaluated now. The stored state is never used."""
    chosen, network = chain(1), Network()
    x0 = data(300)
    for epoch in range(5):
        visits = chosen.plan(IDS, epoch)
        level = chosen.position(IDS, epoch)[3]
        assert sorted([*visits.teacher_rows.tolist(), *np.flatnonzero(level == 0)]) == IDS.tolist()
        results = [visit_loss(network, x0, state, visits)[0] for state in (torch.zeros_like(x0), x0 + 100)]
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("x0_weight", ["lowest", "visits"])
def test_the_target_of_the_lowest_level_is_x0(x0_weight: str) -> None:
    chosen, network = chain(3, x0_weight=x0_weight), Network()
    x0 = data(300)
    visits = chosen.plan(IDS, 6)
    lowest = torch.from_numpy(chosen.position(IDS, 6)[3] == 0)
    assert 10 < int(lowest.sum()) < 290
    losses, output = visit_loss(network, x0, x0 + 50, visits)
    torch.testing.assert_close(losses[lowest], pseudo_huber(output, x0, C)[lowest])
    assert (losses[~lowest] != pseudo_huber(output, x0, C)[~lowest]).all()


def test_x0_weight_is_1_at_the_lowest_level_only_or_1_over_n_plus_1() -> None:
    level = chain(3).position(IDS, 6)[3]
    np.testing.assert_array_equal(chain(3).plan(IDS, 6).x0_weight, level == 0)
    np.testing.assert_allclose(chain(3, x0_weight="visits").plan(IDS, 6).x0_weight, 1 / (level + 1.0), rtol=1e-7)


@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_weights_are_1_or_the_inverse_gap_of_levels(kind: str) -> None:
    assert (chain(2, kind=kind).plan(IDS, 6).weight == 1).all()
    chosen = chain(2, kind=kind, weighting="gap")
    level = chosen.position(IDS, 6)[3]
    sigma = np.minimum(chosen.schedule.sigma(chosen.schedule.levels(8)), 80)
    expected = [1 / (sigma[k] - (sigma[k - 1] if k else 0)) for k in level]
    visits = chosen.plan(IDS, 6)
    np.testing.assert_allclose(visits.weight, expected, rtol=1e-6)
    x0 = data(300)
    plain = Visits(**{**vars(visits), "weight": torch.ones(300)})
    weighted = visit_loss(Network(), x0, x0, visits)[0]
    torch.testing.assert_close(weighted, visits.weight * visit_loss(Network(), x0, x0, plain)[0])


# The loss of a visit.


@pytest.mark.parametrize("kind", ["ve", "vp"])
@pytest.mark.parametrize("length", [1, 2, 4, "trajectory"])
def test_every_target_is_f_at_the_level_below_on_the_same_path(length: int | str, kind: str) -> None:
    """With frozen weights, the stored state equals the network's estimate at the level below, element by element."""
    chosen, network = chain(length, kind=kind), Network()
    x0, state = data(40), torch.full((40, *SHAPE), 1e3)  # must have no effect on a loss before a state is written
    ids = np.arange(40)
    times = chosen.schedule.levels(8)
    stored = 0
    for epoch in range(22):
        visits, (_, _, visit, level) = chosen.plan(ids, epoch), chosen.position(ids, epoch)
        eps = rng.normal(visits.noise_key, SHAPE)
        losses, output = visit_loss(network, x0, state, visits)
        for i in range(40):
            own = torch.from_numpy(chosen.schedule.coefficients(times[level[i : i + 1]]))[:, 0]
            torch.testing.assert_close(output[i], f_at(network, own, x0[i], eps[i]))
            target = x0[i]
            if level[i]:
                below = torch.from_numpy(chosen.schedule.coefficients(times[level[i : i + 1] - 1]))[:, 0]
                target = f_at(network, below, x0[i], eps[i])
                if visit[i]:
                    torch.testing.assert_close(state[i], target)
                    stored += 1
            torch.testing.assert_close(losses[i : i + 1], pseudo_huber(output[i : i + 1], target[None], C))
        state = output
    assert (stored == 0) == (length == 1)


def test_the_condition_is_new_noise_and_not_the_state() -> None:
    chosen, network = chain(2, conditioned=True), Network()
    x0, state = data(300), data(300) + 7
    seen = []
    for epoch in (4, 5):
        visits = chosen.plan(IDS, epoch)
        visit_loss(network, x0, state, visits)
        (_, first, _), (_, second, _) = network.calls[-2:]  # the evaluation of the target, then the one that is trained
        assert first is not None and second is not None
        torch.testing.assert_close(second, rng.normal(visits.condition_key, SHAPE))
        torch.testing.assert_close(first, second)  # one condition per visit
        eps = rng.normal(visits.noise_key, SHAPE)
        assert abs(np.corrcoef(second.flatten(), eps.flatten())[0, 1]) < 4.5 / np.sqrt(eps.numel())
        seen.append(second)
    assert abs(np.corrcoef(seen[0].flatten(), seen[1].flatten())[0, 1]) < 4.5 / np.sqrt(seen[0].numel())
    assert abs(float(seen[0].mean())) < 0.1 and abs(float(seen[0].std()) - 1) < 0.1


def test_without_a_condition_the_network_gets_none() -> None:
    chosen, network = chain(2), Network()
    visit_loss(network, data(300), data(300), chosen.plan(IDS, 4))
    assert [condition for _, condition, _ in network.calls] == [None, None]


def test_only_the_trained_evaluation_has_a_gradient_and_the_state_has_none() -> None:
    chosen, network = chain(3, x0_weight="visits"), Network()
    x0 = data(300)
    state = (x0 + 0.1).requires_grad_()
    visits = chosen.plan(IDS, 5)
    losses, new_state = visit_loss(network, x0, state.detach(), visits)
    assert [grad for _, _, grad in network.calls] == [False, True]
    assert losses.requires_grad and not new_state.requires_grad
    losses.sum().backward()
    assert network.weight.grad is not None

    # The gradient is that for a fixed target: compare with finite differences of the output only.
    def held(weight: float) -> float:
        other = Network()
        with torch.no_grad():
            other.weight.fill_(weight)
        at = Coefficients(*visits.coefficients.double())
        x64 = x0.double()
        eps = rng.normal(visits.noise_key, SHAPE).double()
        s = [c[:, None, None, None] for c in at]
        xt = s[0] * x64 + s[1] * eps
        output = s[2] * xt + s[3] * torch.tanh(weight * s[4] * xt + s[5])
        total = visits.x0_weight.double() * pseudo_huber(output, x64, C)
        total += (1 - visits.x0_weight.double()) * pseudo_huber(output, target.double(), C)
        return float(total.sum())

    target = state.detach().clone()
    rows = visits.teacher_rows
    with torch.no_grad():
        below = Visits(**{**vars(visits), "coefficients": visits.coefficients.clone()})
        below.coefficients[:, rows] = visits.teacher_coefficients
        target[rows] = visit_loss(network, x0, state.detach(), below)[1][rows]
    slope = (held(0.7 + 1e-5) - held(0.7 - 1e-5)) / 2e-5
    assert float(network.weight.grad) == pytest.approx(slope, rel=1e-3)


def test_the_state_is_not_modified() -> None:
    """It may be the store's own memory."""
    chosen = chain(2)
    state = data(300)
    before = state.clone()
    visit_loss(Network(), data(300), state, chosen.plan(IDS, 4))
    assert torch.equal(state, before)


def test_labels_reach_both_evaluations() -> None:
    class Labelled(Network):
        def forward(self, x: Any, level: Any, condition: Any, labels: Any) -> torch.Tensor:
            seen.append(labels)
            return super().forward(x, level, condition, labels)

    seen: list[torch.Tensor] = []
    chosen = chain(2)
    visits, labels = chosen.plan(IDS, 4), torch.arange(300)
    visit_loss(Labelled(), data(300), data(300), visits, labels)
    assert torch.equal(seen[0], labels) and torch.equal(seen[1], labels)
