"""iCT, ECT and the EDM denoiser: targets of visits, compared with their definitions; and pretraining."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import networks, objectives, rng
from udddm.backends import engines
from udddm.backends.distributed.ranks import Ranks
from udddm.config import ECTConfig, EDMConfig, ICTConfig, ScheduleConfig, resolve
from udddm.diffusion import samplers
from udddm.diffusion.schedule import Coefficients, NoiseSchedule, build
from udddm.objectives.ect import ECT
from udddm.objectives.edm import EDM
from udddm.objectives.ict import ICT
from udddm.objectives.loss import Teacher, pseudo_huber, visit_loss

IDS = np.arange(4000)
SHAPE = (1, 4, 4)
SCHEDULES = pytest.mark.parametrize("schedule", [build(ScheduleConfig(kind="ve")), build(ScheduleConfig(kind="vp"))])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: torch.Tensor, level: torch.Tensor, condition: object, labels: object) -> torch.Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        return torch.tanh(self.weight * x + level[:, None, None, None])


def sigmas(schedule: NoiseSchedule, coefficients: torch.Tensor) -> np.ndarray:
    at = Coefficients(*coefficients)
    return (at.sigma / at.alpha).double().numpy()


@SCHEDULES
def test_ict_levels_double_and_the_teacher_is_one_level_below(schedule: NoiseSchedule) -> None:
    config = ICTConfig(s0=10, s1=1280)
    one = ICT(schedule, config, 0.1, 3, 160, False)
    counts = [one.levels(epoch) for epoch in range(160)]
    assert sorted(set(counts)) == [10 * 2**i for i in range(8)]
    assert all(counts.count(n) == 20 for n in set(counts))  # equal fractions of the run
    for epoch in (0, 50):
        visits = one.plan(IDS, epoch)
        levels = np.minimum(schedule.sigma(schedule.levels(counts[epoch])), 80)
        at = sigmas(schedule, visits.coefficients)
        k = np.abs(at[:, None].clip(0, 80) - levels[None]).argmin(1)
        assert k.min() == 1
        np.testing.assert_allclose(visits.x0_weight.numpy(), k == 1)
        assert np.array_equal(visits.teacher_rows.numpy(), np.flatnonzero(k > 1))
        below = sigmas(schedule, visits.teacher_coefficients)
        np.testing.assert_allclose(below, levels[k[k > 1] - 1], rtol=1e-4)
        np.testing.assert_allclose(
            visits.weight.numpy(), 1 / (levels[k] - np.where(k > 0, levels[k - 1], 0)), rtol=1e-4
        )


def test_ict_draws_levels_lognormally() -> None:
    """The fraction of each level is the normal probability of its interval of ln sigma (mean -1.1, deviation 2)."""
    schedule = build(ScheduleConfig(kind="ve", sigma_min=0.002, sigma_max=80))
    visits = ICT(schedule, ICTConfig(s0=20, s1=20), 0.1, 3, 10, False).plan(np.arange(40_000), 0)
    log_levels = np.log(schedule.sigma(schedule.levels(20)))
    k = np.abs(np.log(sigmas(schedule, visits.coefficients))[:, None] - log_levels[None]).argmin(1)
    seen = np.bincount(k, minlength=21)[1:] / 40_000
    normal = np.array([0.5 * (1 + math.erf((s + 1.1) / 2 / math.sqrt(2))) for s in log_levels])
    expected = np.diff(normal) / (normal[-1] - normal[0])
    np.testing.assert_allclose(seen, expected, atol=0.006)


@SCHEDULES
def test_ect_gap_shrinks_by_its_formula(schedule: NoiseSchedule) -> None:
    config = ECTConfig(stages=4)
    one = ECT(schedule, config, 0.1, 3, 40, False)
    gaps = []
    for epoch, a in ((0, 1), (10, 2), (39, 4)):
        sigma, r, stored, _ = one.visit(IDS, epoch)
        assert not stored.any()
        formula = sigma * (1 - (1 + 8 / (1 + np.exp(sigma))) / 2**a)
        np.testing.assert_allclose(r, np.where(formula < schedule.lowest, 0, formula), rtol=1e-9)
        visits = one.plan(IDS, epoch)
        np.testing.assert_allclose(sigmas(schedule, visits.coefficients), sigma, rtol=2e-3)
        np.testing.assert_allclose(sigmas(schedule, visits.teacher_coefficients), r[r > 0], rtol=2e-3)
        np.testing.assert_allclose(visits.x0_weight.numpy(), r == 0)
        np.testing.assert_allclose(visits.weight.numpy(), 1 / (sigma - r), rtol=1e-5)
        gaps.append((1 - r / sigma).mean())
    assert gaps[0] > gaps[1] > 1.5 * gaps[2]


@SCHEDULES
@pytest.mark.parametrize("length", [2, 3])
def test_a_visit_of_an_ect_chain_has_its_target_from_the_previous_visit(schedule: NoiseSchedule, length: int) -> None:
    """A stored target is f at r with the noise of this visit, as stored in the previous visit of the sample."""
    one = ECT(schedule, ECTConfig(stages=2, length=length), 0.1, 3, 20, False)
    shares = []
    before = one.visit(IDS, 0)
    assert not before[2].any()
    for epoch in range(1, 20):
        sigma, r, stored, key = one.visit(IDS, epoch)
        np.testing.assert_allclose(r[stored], before[0][stored], rtol=1e-6)
        assert (key[stored] == before[3][stored]).all() and sigma.max() <= schedule.highest
        visits = one.plan(IDS, epoch)
        assert not stored[visits.teacher_rows.numpy()].any() and not visits.x0_weight.numpy()[stored].any()
        shares.append(stored.mean())
        before = sigma, r, stored, key
    assert shares[9] == 0  # a new stage has other gaps: no stored state can be used
    settled = np.array(shares)[[4, 5, 6, 7, 14, 15, 16, 17]].mean()
    assert (length - 1) / length - 0.1 < settled <= (length - 1) / length + 0.02  # some chains end at the highest level


@SCHEDULES
@pytest.mark.parametrize("name", ["ict", "ect", "edm"])
def test_loss_and_next_state_by_definition(schedule: NoiseSchedule, name: str) -> None:
    made: dict[str, Any] = {
        "ict": ICT(schedule, ICTConfig(), 0.3, 3, 40, False),
        "ect": ECT(schedule, ECTConfig(), 0.3, 3, 40, False),
        "edm": EDM(schedule, EDMConfig(), 3, 16, False),
    }
    one, network = made[name], Network()
    ids = np.arange(50)
    visits = one.plan(ids, 12)
    g = torch.Generator().manual_seed(0)
    x0, state = torch.randn(50, *SHAPE, generator=g), torch.randn(50, *SHAPE, generator=g)
    losses, after = visit_loss(network, x0, state, visits)
    eps = rng.normal(visits.noise_key, SHAPE)

    def f(at: Coefficients, rows: Any) -> torch.Tensor:
        c_in, alpha, sigma = (v[:, None, None, None] for v in (at.c_in, at.alpha, at.sigma))
        xt = alpha * x0[rows] + sigma * eps[rows]
        answer = torch.tanh(0.7 * c_in * xt + at.c_noise[:, None, None, None])
        return at.c_skip[:, None, None, None] * xt + at.c_out[:, None, None, None] * answer

    output = f(Coefficients(*visits.coefficients), slice(None))
    torch.testing.assert_close(after, output)
    assert not after.requires_grad
    if name == "edm":
        sigma = torch.from_numpy(sigmas(schedule, visits.coefficients)).float()
        edm = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        torch.testing.assert_close(losses, edm * (output - x0).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
        assert network.calls == [(50, True)]
    else:
        target = x0.clone()
        target[visits.teacher_rows] = f(Coefficients(*visits.teacher_coefficients), visits.teacher_rows)
        torch.testing.assert_close(losses, visits.weight * pseudo_huber(output, target, 0.3))
        assert network.calls == [(50, False), (50, True)]
    again, _ = visit_loss(network, x0, torch.zeros_like(state), visits)  # the state is not used
    torch.testing.assert_close(again, losses)


def test_plans_are_functions_of_seed_sample_and_epoch() -> None:
    schedule = build(ScheduleConfig())
    for kind in (
        lambda seed: ICT(schedule, ICTConfig(), 0.1, seed, 40, True),
        lambda seed: ECT(schedule, ECTConfig(), 0.1, seed, 40, True),
        lambda seed: EDM(schedule, EDMConfig(), seed, 16, True),
    ):
        a, some = kind(3).plan(IDS, 7), kind(3).plan(IDS[[5, 900]], 7)
        assert torch.equal(a.coefficients[:, [5, 900]], some.coefficients)
        assert torch.equal(a.noise_key[[5, 900]], some.noise_key)
        for other in (kind(4).plan(IDS, 7), kind(3).plan(IDS, 8)):
            assert not torch.equal(a.coefficients, other.coefficients)
            assert not (a.noise_key == other.noise_key).any()


class Probe(nn.Module):
    """A network with dropout in two layers. Records the units that each call drops, and the noise levels."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.calls: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def forward(self, x: torch.Tensor, level: torch.Tensor, condition: object, labels: object) -> torch.Tensor:
        masks = [self.dropout(torch.ones(len(x), width)) for width in (5, 300)]
        self.calls.append((level, masks))
        return x * masks[0][:, :1, None, None]


DROPPING: dict[str, dict[str, Any]] = {
    "ict": {"name": "ict"},
    "ect": {"name": "ect", "pretrain": 0.0},
    "ect in chains": {"name": "ect", "pretrain": 0.0, "ect": {"length": 3}},
    "chain": {"name": "chain"},
    "long chain": {"name": "chain", "chain": {"length": 8}},
}
SMALL: dict[str, Any] = {
    "base_channels": 16,
    "channel_mult": [1, 2],
    "blocks_per_level": 1,
    "attention_resolutions": [2],
}


@pytest.mark.parametrize("settings", DROPPING.values(), ids=DROPPING)
def test_teacher_and_student_drop_the_same_units_of_every_row(settings: dict[str, Any]) -> None:
    config = resolve({"objective": settings, "network": {"dropout": 0.3}})
    schedule = build(config.schedule)
    one, network = objectives.build(config, schedule, 40, SHAPE), Probe()
    teacher = objectives.teacher_of(config)
    images, ids = torch.zeros(64, *SHAPE), np.arange(64)
    partly = 0
    for epoch in (0, 9, 25):
        visits = one.plan(ids, epoch)
        network.calls.clear()
        torch.manual_seed(epoch)
        visit_loss(network, images, images, visits, None, teacher)
        if not len(visits.teacher_rows):
            assert len(network.calls) == 1
            continue
        partly += len(visits.teacher_rows) < 64
        (below, first), (level, second) = network.calls
        for a, b in zip(first, second, strict=True):
            assert a.shape == b.shape and torch.equal(a, b) and not a.all()
        assert torch.equal(level, visits.coefficients[5])
        assert torch.equal(below[visits.teacher_rows], visits.teacher_coefficients[5])
    assert partly


@pytest.mark.parametrize("name", ["ict", "ect", "chain"])
def test_without_dropout_only_the_rows_that_need_it_are_evaluated(name: str) -> None:
    """The losses equal those with a teacher that evaluates every row."""
    tree = {"objective": {"name": name, "pretrain": 0.0}, "network": {"dropout": 0.0}, "train": {"steps": 1}}
    config, compiled = resolve(tree), resolve({**tree, "train": {"steps": 1, "compile": True}})
    one = objectives.build(config, build(config.schedule), 40, SHAPE)
    some, every = (objectives.teacher_of(c) for c in (config, compiled))
    g = torch.Generator().manual_seed(0)
    for epoch in range(40):
        for batch in (50, 7, 1):
            ids = np.arange(batch) + 100 * epoch
            images, state = torch.randn(batch, *SHAPE, generator=g), torch.randn(batch, *SHAPE, generator=g)
            visits, network = one.plan(ids, epoch), Network()
            losses, _ = visit_loss(network, images, state, visits, None, some)
            torch.testing.assert_close(losses, visit_loss(Network(), images, state, visits, None, every)[0])
            needed = len(visits.teacher_rows)
            assert network.calls == [*([(needed, False)] if needed else []), (batch, True)]
            assert some.evaluated(visits) == needed and every.evaluated(visits) == (batch if needed else 0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["chain", "ict", "ect"])
def test_every_parameter_has_a_gradient_after_a_teacher_s_call_under_autocast(name: str, dropout: float) -> None:
    """PyTorch before 2.11 would reuse weights cast in the teacher's call, which have no gradient."""
    network = {**SMALL, "dropout": dropout}
    train = {"steps": 8, "precision": "bf16"}
    config = resolve({"objective": {"name": name, "pretrain": 0}, "network": network, "train": train})
    one = objectives.build(config, build(config.schedule), 40, SHAPE)
    built = engines.build(networks.for_run(config, SHAPE), config, Ranks(0, 1, torch.device("cpu")), 8)
    teacher = objectives.teacher_of(config, built)
    x0, visits = torch.zeros(16, *SHAPE), one.plan(np.arange(16), 30)
    assert len(visits.teacher_rows)
    with built.autocast():
        losses, _ = visit_loss(built.module, x0, x0, visits, None, teacher)
    built.backward(losses.mean())
    assert not [n for n, p in built.module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_every_step_has_two_calls_if_calls_exchange_weights() -> None:
    schedule = build(ScheduleConfig())
    for every_row in (False, True):
        one, network = EDM(schedule, EDMConfig(), 3, 16, False), Network()
        images = torch.zeros(50, *SHAPE)
        teacher = Teacher(every_row=every_row, lockstep=True)
        visit_loss(network, images, images, one.plan(np.arange(50), 0), None, teacher)
        assert network.calls == [(1, False), (50, True)]


@SCHEDULES
def test_heun_generates_the_data_of_an_exact_denoiser(schedule: NoiseSchedule) -> None:
    """If sigma_data is the deviation of Gaussian data, EDM's c_skip alone is the exact denoiser, with F = 0."""

    class Zero(nn.Module):
        def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            return torch.zeros_like(x)

    def deviation(steps: int) -> float:
        return float(
            samplers.sample(
                Zero(),
                schedule,
                SHAPE,
                torch.arange(2000),
                options=samplers.SamplingOptions(steps=steps, sampler="heun"),
            ).std()
        )

    assert deviation(79) == pytest.approx(0.5, rel=0.03)
    assert deviation(1) < 0.1  # one evaluation of a denoiser returns the mean


def test_pretraining_trains_a_denoiser_and_then_the_objective_from_its_start() -> None:
    schedule = build(ScheduleConfig())
    for name in ("chain", "ict", "ect", "uddm"):
        config = resolve({"objective": {"name": name, "pretrain": 0.25}})
        plain = resolve({"objective": {"name": name, "pretrain": 0.0}})
        pretrained, after = objectives.build(config, schedule, 40, SHAPE), objectives.build(plain, schedule, 30, SHAPE)
        assert bool((pretrained.plan(IDS, 9).x0_weight == 1).all()) and not len(pretrained.plan(IDS, 9).teacher_rows)
        first, then = pretrained.plan(IDS, 10), after.plan(IDS, 0)
        assert torch.equal(first.coefficients, then.coefficients) and torch.equal(first.x0_weight, then.x0_weight)
        assert torch.equal(first.huber_c, then.huber_c)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"objective": {"name": "ect"}}, 0.4),
        ({"objective": {"name": "ect"}, "train": {"epochs": 40, "init_from": "runs/denoiser"}}, 0.0),
        ({"objective": {"name": "ect", "pretrain": 0.2}, "train": {"epochs": 40, "init_from": "runs/denoiser"}}, 0.2),
        ({"objective": {"name": "ict"}}, 0.0),
        ({"objective": {"name": "edm", "pretrain": 0.2}}, 0.0),
    ],
)
def test_the_pretrained_fraction_of_a_run_and_its_description(settings: dict[str, Any], share: float) -> None:
    config = resolve(settings)
    assert objectives.pretrain_share(config) == share
    built = objectives.build(config, build(config.schedule), 40, SHAPE)
    described = objectives.describe(config, built)
    assert described.startswith(config.objective.name) and ("after a denoiser" in described) == (share > 0)
    assert isinstance(built, objectives.Pretrained) == (share > 0)
    if isinstance(built, objectives.Pretrained):
        assert built.epochs == share * 40


def test_ect_s_settings_for_imagenet_64() -> None:
    """Four stages of q = 4, the weight 1/sigma^2 + 1/sigma_data^2, and another distribution of sigma (arXiv 2406.14548;
    the authors' code writes the weight as (sigma^2 + sigma_data^2) / (sigma sigma_data)^2)."""
    settings = {"q": 4, "stages": 4, "weighting": "snr", "p_mean": -0.8, "p_std": 1.6}
    tree = {"objective": {"name": "ect", "pretrain": 0.0, "ect": settings}, "network": {"condition": "none"}}
    config = resolve({**tree, "schedule": {"kind": "ve", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.4}})
    one = objectives.build(config, build(config.schedule), 40, SHAPE)
    logs = []
    for epoch, stage in ((0, 1), (9, 1), (10, 2), (25, 3), (39, 4)):
        visits = one.plan(IDS, epoch)
        at, below = Coefficients(*visits.coefficients), Coefficients(*visits.teacher_coefficients)
        sigma, r = at.sigma.double().numpy(), below.sigma.double().numpy()
        taught = visits.teacher_rows.numpy()
        expected = sigma * (1 - (1 + 8 / (1 + np.exp(sigma))) / 4**stage)
        np.testing.assert_allclose(r, expected[taught], rtol=1e-5)
        assert (np.delete(expected, taught) < 0.002 + 1e-6).all()
        np.testing.assert_allclose(visits.weight.numpy(), (sigma**2 + 0.16) / (0.4 * sigma) ** 2, rtol=1e-5)
        logs.append(np.log(sigma))
    assert np.mean(logs) == pytest.approx(-0.8, abs=0.1) and np.std(logs) == pytest.approx(1.6, abs=0.1)
