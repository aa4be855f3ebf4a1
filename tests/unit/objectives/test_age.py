"""`store_age_ratio`: how far stored targets are from what the network says now, relative to what they teach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import objectives, rng
from udddm.config import resolve
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients, build
from udddm.objectives.age import age_norms
from udddm.objectives.loss import visit_loss

SHAPE = (1, 4, 4)
IDS = np.arange(300)
STORED = [{"name": "chain"}, {"name": "ect", "pretrain": 0.0, "ect": {"length": 2}}]


class Network(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor, level: torch.Tensor, condition: object, labels: object) -> torch.Tensor:
        return torch.tanh(self.weight * x + level[:, None, None, None])


def built(objective: dict[str, Any]) -> objectives.Objective:
    config = resolve({"seed": 3, "objective": objective, "network": {"condition": "none"}})
    return objectives.build(config, build(config.schedule), 60, SHAPE)


@pytest.mark.parametrize("objective", STORED, ids=["chain", "ect"])
def test_the_ratio_is_that_of_the_change_since_a_target_was_stored(objective: dict[str, Any]) -> None:
    one, then, now = built(objective), Network(0.7), Network(0.75)
    x0 = torch.randn(300, *SHAPE, generator=torch.Generator().manual_seed(0))
    before, visits = one.plan(IDS, 33), one.plan(IDS, 34)
    _, state = visit_loss(then, x0, x0, before)
    rows, coefficients = visits.stored_rows, visits.stored_coefficients
    assert rows is not None and coefficients is not None and 50 < len(rows) < 250
    assert torch.equal(before.noise_key[rows], visits.noise_key[rows])
    torch.testing.assert_close(coefficients, before.coefficients[:, rows])  # where the state was stored
    assert not set(rows.tolist()) & set(visits.teacher_rows.tolist())

    _, output = visit_loss(now, x0, state, visits)
    age, lesson = age_norms(now, x0, state, output, visits)
    at = Coefficients(*coefficients)
    with torch.no_grad():
        xr = add_noise(x0[rows], rng.normal(visits.noise_key[rows], SHAPE), at)
        old, new = (denoise(network, xr, at, None, None) for network in (then, now))
    assert float(age) == pytest.approx(float((old - new).flatten(1).norm(dim=1).sum()), rel=1e-4)
    assert float(lesson) == pytest.approx(float((output[rows] - new).flatten(1).norm(dim=1).sum()), rel=1e-4)
    assert float(age_norms(then, x0, state, output, visits)[0]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "chain", "chain": {"length": 1}},
        {"name": "ict"},
        {"name": "ict", "refined": {"share": 0.5}},
        {"name": "ect", "pretrain": 0.0},
        {"name": "edm"},
    ],
)
def test_objectives_without_stored_targets_have_none(objective: dict[str, Any]) -> None:
    assert built(objective).plan(IDS, 30).stored_rows is None
