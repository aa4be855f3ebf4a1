"""Pretraining: with any objective, the first epochs train the denoiser, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import objectives, rng
from udddm.backends.distributed.ranks import Ranks
from udddm.config import resolve
from udddm.config.plugins import OBJECTIVES
from udddm.data import ArrayImages, ImageDataset
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients, build
from udddm.objectives.base import Ids, Objective, ObjectiveContext, Visits
from udddm.objectives.edm import EDM
from udddm.runs.run import Run
from udddm.training.trainer import Trainer

SHAPE = (1, 4, 4)
UNFIT = ("uddm", "none")  # Algorithm 1 passes the state to the network
NAMES = sorted(set(OBJECTIVES.members) - {"edm"})


class Conditioned(nn.Module):
    """Depends on all of its inputs, so that a wrong input is detected."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.calls: list[bool] = []

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, condition: torch.Tensor | None, labels: object
    ) -> torch.Tensor:
        self.calls.append(torch.is_grad_enabled())
        given = 0 if condition is None else 0.3 * condition
        return torch.tanh(self.weight * x + given + level[:, None, None, None])


@pytest.mark.parametrize(
    ("name", "condition"),
    [(name, condition) for name in NAMES for condition in ("cross-attention", "none") if (name, condition) != UNFIT],
)
def test_the_loss_is_that_of_the_denoiser_with_its_weights_and_without_the_state(name: str, condition: str) -> None:
    config = resolve({"objective": {"name": name, "pretrain": 0.25}, "network": {"condition": condition}})
    schedule = build(config.schedule)
    built = objectives.build(config, schedule, 40, SHAPE)
    teacher = objectives.teacher_of(config)
    g = torch.Generator().manual_seed(0)
    x0, state = torch.randn(50, *SHAPE, generator=g), torch.randn(50, *SHAPE, generator=g)
    for epoch in (0, 9):
        visits, network = built.plan(np.arange(50), epoch), Conditioned()
        losses, after = objectives.visit_loss(network, x0, state, visits, None, teacher)
        assert network.calls == [True]

        at = Coefficients(*visits.coefficients)
        sigma = (at.sigma / at.alpha).double()
        assert len(sigma.unique()) > 40  # lognormal, not one of a few levels
        given = rng.normal(visits.condition_key, SHAPE) if condition != "none" else None
        f = denoise(Conditioned(), add_noise(x0, rng.normal(visits.noise_key, SHAPE), at), at, given, None)
        torch.testing.assert_close(after, f.detach())
        data = config.schedule.sigma_data
        weight = ((sigma**2 + data**2) / (sigma * data) ** 2).float()
        assert float(weight.max() / weight.min()) > 50
        torch.testing.assert_close(losses, weight * (f - x0).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)

        elsewhere, _ = objectives.visit_loss(Conditioned(), x0, state + 9, visits, None, teacher)
        assert torch.equal(losses, elsewhere)


def weights_after(steps: int, where: Path, **objective: Any) -> dict[str, torch.Tensor]:
    network = {
        "base_channels": 8,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "head_dim": 8,
        "dropout": 0.1,
        "condition": "cross-attention",
    }
    train = {"steps": 8, "batch_size": 32, "learning_rate": 1e-3, "ema": [0.9]}
    order = {"lanes": 4, "chunk": 8, "window": 2}
    config = resolve({"network": network, "train": train, "order": order, "objective": objective})
    images = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), np.uint8)
    trainer = Trainer(config, ImageDataset(ArrayImages(images)), Run(where), Ranks(0, 1, torch.device("cpu")))
    assert trainer.order.steps_per_epoch == 2
    inputs = trainer.begin()
    try:
        for _ in range(steps):
            trainer.train_step(inputs)
    finally:
        inputs.close()
        trainer.store.close()
    return {name: value.clone() for name, value in trainer.engine.weights().items()}


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_those_of_a_denoiser_run_until_pretraining_ends(name: str, tmp_path: Path) -> None:
    for steps, same in ((4, True), (5, False)):  # pretraining is half of four epochs with two steps each
        denoiser = weights_after(steps, tmp_path / f"edm-{steps}", name="edm")
        trained = weights_after(steps, tmp_path / f"run-{steps}", name=name, pretrain=0.5)
        assert all(torch.equal(denoiser[key], trained[key]) for key in denoiser) == same


CREATED: list[float] = []


class Counted(EDM):
    """A custom objective that is pretrained."""

    is_denoiser = False
    default_pretrain = 0.3

    @classmethod
    def create(cls, context: ObjectiveContext) -> Counted:
        CREATED.append(context.epochs)
        return super().create(context)


def plain_function(context: ObjectiveContext) -> Objective:
    return Counted.create(context)


class Direct(Objective):
    """An objective without `create`."""

    default_pretrain = 0.5

    def __init__(self, context: ObjectiveContext):
        self.epochs = context.epochs

    def plan(self, ids: Ids, epoch: int) -> Visits:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("factory", "settings", "own"),
    [
        ("Counted", {}, 28.0),
        ("Counted", {"pretrain": 0.0}, 40.0),
        ("Counted", {"pretrain": 0.5}, 20.0),
        ("plain_function", {}, 40.0),
    ],
)
def test_an_objective_is_created_once_for_its_part_of_the_run(
    factory: str, settings: dict[str, Any], own: float
) -> None:
    config = resolve({"objective": {"name": f"{__name__}:{factory}", **settings}})
    CREATED.clear()
    built = objectives.build(config, build(config.schedule), 40, SHAPE)
    assert [own] == CREATED
    assert isinstance(built, objectives.Pretrained) == (own < 40)
    share = objectives.pretrain_share(config)
    assert math.isclose(share, 1 - own / 40)
    assert (f"after a denoiser for {share:.0%} of" in objectives.describe(config, built)) == (share > 0)


def test_a_class_without_create_is_called_with_the_context() -> None:
    config = resolve({"objective": {"name": f"{__name__}:Direct"}})
    built = objectives.build(config, build(config.schedule), 40, SHAPE)
    assert isinstance(built, objectives.Pretrained) and isinstance(built.then, Direct)
    assert built.epochs == 20 and built.then.epochs == 20
