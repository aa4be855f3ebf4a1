"""Refined pairs: which visits have an estimate as their image, with which noise and level, and what they train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import objectives, rng
from udddm.config import resolve
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients, build
from udddm.errors import ConfigError
from udddm.objectives import LabelDropout
from udddm.objectives.base import Objective, Visits
from udddm.objectives.loss import EVERY_ROW, Teacher, pseudo_huber, visit_loss
from udddm.objectives.refined import initial_values, is_generation_zero
from udddm.store.encoding import Encoding, StateDtype, generation_zero

SHAPE = (1, 4, 4)
IDS = np.arange(1500)
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"name": "ict", "ict": {"s0": 10, "s1": 40}},
        {"name": "ict", "ict": {"s0": 10, "s1": 40}, "pretrain": 0.25},
        {"name": "ect", "ect": {"stages": 3}, "pretrain": 0.0},
    ],
    ids=["ict", "pretrained", "ect"],
)


def built(
    kind: dict[str, Any], epochs: float = 60, schedule: str = "ve", conditioned: bool = False, **refined: Any
) -> Objective:
    refined = {"share": 0.5, "above": 0.8, **refined}
    tree = {
        "seed": 3,
        "objective": {**kind, "refined": refined},
        "network": {"condition": "channels" if conditioned else "none"},
        "schedule": {"kind": schedule},
    }
    config = resolve(tree)
    return objectives.build(config, build(config.schedule), epochs, SHAPE)


def sigmas(visits: Visits) -> np.ndarray:
    at = Coefficients(*visits.coefficients)
    return (at.sigma / at.alpha).double().numpy()


def rows(visits: Visits) -> np.ndarray:
    """The refined visits [B]."""
    assert visits.refined is not None
    return visits.refined.rows.numpy()


def first_epoch(kind: dict[str, Any]) -> int:
    """The first epoch of the objective, after pretraining."""
    return 15 if kind.get("pretrain") else 0


class Network(nn.Module):
    """Depends on all of its inputs, and draws a dropout mask."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, level: torch.Tensor, condition: object, labels: object) -> torch.Tensor:
        return self.drop(torch.tanh(self.weight * x + level[:, None, None, None]))


# The plan.


@KINDS
@pytest.mark.parametrize(("length", "share"), [(2, 0.5), (2, 0.2), (4, 0.6)])
def test_a_refined_visit_has_the_noise_and_the_level_of_the_visit_before(
    kind: dict[str, Any], length: int, share: float
) -> None:
    one = built(kind, length=length, share=share)
    before = one.plan(IDS, 0)
    for epoch in range(1, 60):
        visits = one.plan(IDS, epoch)
        if visits.refined is not None:
            refined = rows(visits)
            assert torch.equal(visits.noise_key[refined], before.noise_key[refined])
            assert torch.equal(visits.coefficients[:, refined], before.coefficients[:, refined])
            assert (sigmas(visits)[refined] > 0.8).all()
            # The others draw their noise anew.
            assert not (visits.noise_key[~refined] == before.noise_key[~refined]).any()
        before = visits


@KINDS
@pytest.mark.parametrize(("length", "share"), [(2, 0.5), (2, 0.2), (4, 0.6)])
def test_the_share_of_refined_visits_above_the_level_is_as_configured(
    kind: dict[str, Any], length: int, share: float
) -> None:
    one, shares = built(kind, epochs=240, length=length, share=share), []
    for epoch in range(140, 155):  # far from a change of levels
        visits = one.plan(IDS, epoch)
        shares.append(rows(visits)[sigmas(visits) > 0.8].mean())
    assert np.mean(shares) == pytest.approx(share, abs=0.02)


@KINDS
def test_levels_are_distributed_as_without_refined_pairs(kind: dict[str, Any]) -> None:
    plain, one = built(kind, share=0.0), built(kind)
    for epoch in (30, 31):
        expected, found = (np.sort(np.log(sigmas(each.plan(IDS, epoch)))) for each in (plain, one))
        assert np.abs(expected - found).mean() < 0.15  # the distance of two distributions of deviation 2


@KINDS
def test_with_a_share_of_0_nothing_changes(kind: dict[str, Any]) -> None:
    config = resolve({"seed": 3, "objective": kind, "network": {"condition": "none"}, "schedule": {"kind": "ve"}})
    plain, one = objectives.build(config, build(config.schedule), 60, SHAPE), built(kind, share=0.0, above=0.1)
    for epoch in (0, 30, 59):
        a, b = plain.plan(IDS, epoch), one.plan(IDS, epoch)
        assert a.refined is b.refined is None
        assert torch.equal(a.noise_key, b.noise_key) and torch.equal(a.coefficients, b.coefficients)


@KINDS
@pytest.mark.parametrize("source", ["store", "network"])
def test_a_plan_is_a_pure_function_of_each_sample(kind: dict[str, Any], source: str) -> None:
    one, again = built(kind, source=source), built(kind, source=source)
    some = IDS[np.array([7, 3, 1499, 40])]
    for epoch in (5, 22, 40):
        whole, part = one.plan(IDS, epoch), again.plan(some, epoch)
        assert torch.equal(whole.noise_key[some], part.noise_key)
        assert torch.equal(whole.coefficients[:, some], part.coefficients)
        if whole.refined is not None and part.refined is not None:
            assert torch.equal(whole.refined.rows[some], part.refined.rows)
            assert torch.equal(whole.refined.initial[some], part.refined.initial)


@KINDS
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_nothing_is_refined_from_before_the_start_or_from_other_levels(kind: dict[str, Any], start: float) -> None:
    """A chain neither continues from pretraining or from before `start`, nor across a change of the levels."""
    one, first = built(kind, start=start), first_epoch(kind)
    length = 60 - first
    stages = [first + int(np.ceil(i * length / 3)) for i in range(3)]
    begins = {first + int(np.ceil(start * length)), *stages}
    for epoch in range(60):
        visits = one.plan(IDS, epoch)
        allowed = epoch not in begins and epoch >= first + start * length
        refined = visits.refined is not None and rows(visits).any()
        assert refined == allowed, epoch


@KINDS
def test_a_chain_keeps_its_label_dropped_or_not(kind: dict[str, Any]) -> None:
    one, dropout = built(kind), LabelDropout(3, 0.3, 10)
    for epoch in (31, 32):
        before, visits = one.plan(IDS, epoch - 1), one.plan(IDS, epoch)
        refined = rows(visits)
        assert refined.any() and (dropout.drops(visits)[refined] == dropout.drops(before)[refined]).all()


# What a visit trains.


def batch(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *SHAPE, generator=g), torch.randn(count, *SHAPE, generator=g)


@KINDS
@pytest.mark.parametrize("schedule", ["ve", "vp"])
@pytest.mark.parametrize("above", [0.0, 0.8])
def test_the_loss_and_the_state_of_a_refined_visit(kind: dict[str, Any], schedule: str, above: float) -> None:
    """The student and its fresh teacher see the estimate with the same noise; at the lowest level it is the target."""
    one, network = built(kind, schedule=schedule, above=above), Network()
    x0, state = batch()
    visits = one.plan(np.arange(200), 33)
    losses, after = visit_loss(network, x0, state, visits)
    refined, lowest = rows(visits), visits.x0_weight.numpy() == 1
    assert 20 < refined.sum() < 180
    image = torch.where(visits.refined.rows[:, None, None, None], state, x0)  # type: ignore[union-attr]
    eps = rng.normal(visits.noise_key, SHAPE)
    at, below = Coefficients(*visits.coefficients), Coefficients(*visits.teacher_coefficients)
    with torch.no_grad():
        output = denoise(network, add_noise(image, eps, at), at, None, None)
        target, taught = image.clone(), visits.teacher_rows
        target[taught] = denoise(network, add_noise(image[taught], eps[taught], below), below, None, None)
    assert torch.equal(after, output)
    expected = visits.weight * pseudo_huber(output, target, visits.huber_c)
    torch.testing.assert_close(losses, expected)
    if above == 0.0:
        assert (refined & lowest).any()


def test_nothing_is_refined_from_generation_0() -> None:
    """A sample that was reset because its chunk was corrupt is trained on its image, whatever the plan says."""
    one, network = built({"name": "ict"}, above=0.0), Network()
    x0, state = batch()
    visits = one.plan(np.arange(200), 33)
    reset = rows(visits) & (np.arange(200) % 2 == 0)
    state[reset] = Encoding("fp16").decode(generation_zero(3, np.flatnonzero(reset), SHAPE, Encoding("fp16")))
    losses, _ = visit_loss(network, x0, state, visits)
    unrefined = replace(visits, refined=None)
    expected, _ = visit_loss(network, x0, state, unrefined)
    same = (losses == expected).numpy()
    assert same[reset].all() and not same[rows(visits) & ~reset].any()


@pytest.mark.parametrize("use", ["image", "condition"])
def test_visits_that_are_decided_first_train_the_same(use: str) -> None:
    """A step decides once which visits are refined, for the loss and for the metrics."""
    one, network = built({"name": "ict"}, above=0.0, min_sharpness=0.9, conditioned=True, use=use), Network()
    x0, state = batch()
    visits = one.plan(np.arange(200), 33)
    reset = rows(visits) & (np.arange(200) % 2 == 0)
    state[reset] = generation_zero(3, np.flatnonzero(reset), SHAPE, Encoding("fp32"))
    assert visits.refined is not None
    decided = visits.refined.decided(x0, state)
    assert torch.equal(decided.rows, visits.refined.used(x0, state))
    assert 0 < decided.rows.sum() < rows(visits).sum() - reset.sum()  # neither those of generation 0 nor blurred ones
    expected, found = (visit_loss(network, x0, state, each) for each in (visits, replace(visits, refined=decided)))
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
    final = decided.decided(x0, x0 * 0)
    assert torch.equal(final.rows, decided.rows)  # nothing is decided twice


@KINDS
def test_a_batch_without_refined_visits_is_known_on_the_host(kind: dict[str, Any]) -> None:
    one, known = built(kind), set()
    x0, state = batch()
    for epoch in range(first_epoch(kind), 60):
        refined = one.plan(np.arange(200), epoch).refined
        assert refined is not None and refined.some == bool(refined.rows.any())
        known.add(refined.some)
        if not refined.some:
            assert refined.inputs(refined.rows, x0, None, state)[0] is x0
    assert known == {True, False}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "uint8"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 8, 8), (3, 32, 32)])
def test_generation_0_is_recognized_in_every_encoding(dtype: StateDtype, shape: tuple[int, ...]) -> None:
    encoding, ids = Encoding(dtype), np.arange(500)
    initial = initial_values(3, ids, np.ones(500, np.bool_))
    state = encoding.decode(generation_zero(3, ids, shape, encoding))
    assert is_generation_zero(state, initial).all()
    assert not is_generation_zero(state.roll(1, 0), initial).any()
    assert not is_generation_zero(torch.zeros(500, *shape), initial).any()


def test_estimates_that_are_too_blurred_are_not_used() -> None:
    one = built({"name": "ict"}, above=0.0, min_sharpness=0.25)
    x0, _ = batch()
    visits = one.plan(np.arange(200), 33)
    assert visits.refined is not None and visits.refined.min_sharpness == 0.25
    factor = torch.where(torch.arange(200) % 2 == 0, 0.51, 0.49)[:, None, None, None]  # sharpness is its square
    used = visits.refined.used(x0, x0 * factor + 3)
    assert torch.equal(used, visits.refined.rows & (torch.arange(200) % 2 == 0))


def test_the_estimate_of_the_network_takes_one_more_call_and_no_store() -> None:
    """`source: network`: f of the image with the same noise at the same level, evaluated now."""
    one, network = built({"name": "ict"}, above=0.0, source="network", share=0.4), Network(0.3)
    x0, state = batch()
    visits = one.plan(np.arange(200), 33)
    assert visits.refined is not None
    assert rows(visits).mean() == pytest.approx(0.4, abs=0.1)
    torch.manual_seed(5)
    losses, after = visit_loss(network, x0, state, visits)
    torch.manual_seed(5)
    same, _ = visit_loss(network, x0, state + 1, visits)
    assert torch.equal(losses, same)  # the state is not used
    at, eps = Coefficients(*visits.coefficients), rng.normal(visits.noise_key, SHAPE)
    torch.manual_seed(5)  # all calls of a step drop the same units
    with torch.no_grad():
        estimate = denoise(network, add_noise(x0, eps, at), at, None, None)
    torch.manual_seed(5)
    stored = replace(visits, refined=replace(visits.refined, source="store"))
    expected, expected_after = visit_loss(network, x0, estimate, stored)
    assert torch.equal(losses, expected) and torch.equal(after, expected_after)


@KINDS
def test_the_estimate_as_the_condition(kind: dict[str, Any]) -> None:
    """`use: condition`: the image stays, and the student and its teacher have the estimate as their condition.

    Other visits have noise as their condition, as in the first step of Algorithm 2, and no target is an estimate.
    """

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def forward(
            self, x: torch.Tensor, level: torch.Tensor, condition: torch.Tensor, labels: object
        ) -> torch.Tensor:
            self.seen.append(condition)
            return torch.tanh(0.7 * x + 0.3 * condition + level[:, None, None, None])

    one, network = built(kind, conditioned=True, use="condition", above=0.0), Conditioned()
    x0, state = batch()
    visits = one.plan(np.arange(200), 33)
    losses, after = visit_loss(network, x0, state, visits)
    assert visits.refined is not None and len(network.seen) == 2  # the teacher and the student
    used = visits.refined.rows[:, None, None, None]
    condition = torch.where(used, state, rng.normal(visits.condition_key, SHAPE))
    assert all(torch.equal(seen, condition) for seen in network.seen) and 20 < used.sum() < 180
    at, below = Coefficients(*visits.coefficients), Coefficients(*visits.teacher_coefficients)
    eps, target, taught = rng.normal(visits.noise_key, SHAPE), x0.clone(), visits.teacher_rows
    output = denoise(network, add_noise(x0, eps, at), at, condition, None)
    target[taught] = denoise(network, add_noise(x0[taught], eps[taught], below), below, condition[taught], None)
    torch.testing.assert_close(after, output)
    torch.testing.assert_close(losses, visits.weight * pseudo_huber(output, target, visits.huber_c))


@pytest.mark.parametrize("teacher", [EVERY_ROW, Teacher(every_row=False)])
def test_the_loss_does_not_depend_on_the_batch(teacher: Teacher) -> None:
    one, network = built({"name": "ect", "pretrain": 0.0}), Network()
    x0, state = batch()
    whole, _ = visit_loss(network, x0, state, one.plan(np.arange(200), 33), None, teacher)
    part = slice(40, 90)
    some, _ = visit_loss(network, x0[part], state[part], one.plan(np.arange(200)[part], 33), None, teacher)
    torch.testing.assert_close(whole[part], some)


# The configuration.


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"name": "ect", "ect": {"length": 2}, "refined": {"share": 0.5}},
            r"cannot be both the image.*objective.ect.length",
        ),
        ({"refined": {"share": 0.6}}, r"share 0.6 needs longer chains: with length 2 at most 0.5"),
        ({"refined": {"length": 1}}, r"objective.refined.length"),
        ({"name": "ict", "refined": {"share": 0.5, "use": "condition"}}, r"network.condition=channels"),
    ],
)
def test_bad_settings(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config = resolve({"objective": objective, "network": {"condition": "none"}})
        objectives.build(config, build(config.schedule), 10, SHAPE)


@pytest.mark.parametrize("pretrain", [0.0, 0.25])
@pytest.mark.parametrize(("name", "used"), [("ict", True), ("ect", True), ("chain", False), ("edm", False)])
def test_the_log_says_whether_visits_are_refined(name: str, used: bool, pretrain: float) -> None:
    """A preset's refined pairs are like the sections of the other objectives if another one is selected."""
    config = resolve({"objective": {"name": name, "pretrain": pretrain, "refined": {"share": 0.4}}})
    one = objectives.build(config, build(config.schedule), 20, SHAPE)
    said = objectives.describe(config, one)
    assert ("40% refined visits above sigma 0.8" in said) == used
    assert ("objective.refined is for ict and ect, and not used" in said) == (not used)
    assert used == (one.plan(np.arange(8), 15).refined is not None)
