"""The torch engine: learning rates, and optimizer state in checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines import EngineContext
from udddm.backends.engines.ddp import TorchEngine
from udddm.config import resolve


def test_the_learning_rate_schedule() -> None:
    def engine(**settings: Any) -> TorchEngine:
        config = resolve({"train": {"steps": 100, "learning_rate": 1.0, **settings}})
        return TorchEngine(EngineContext(torch.nn.Linear(2, 2), config, Ranks(0, 1, torch.device("cpu")), 100))

    constant, cosine, linear = engine(), engine(lr_schedule="cosine", warmup_steps=10), engine(lr_schedule="linear")
    assert {constant.learning_rate(s) for s in range(100)} == {1.0}
    assert cosine.learning_rate(0) == pytest.approx(0.1) and cosine.learning_rate(9) == pytest.approx(1.0)
    assert cosine.learning_rate(55) == pytest.approx(0.5) and cosine.learning_rate(99) < 0.001
    assert linear.learning_rate(50) == pytest.approx(0.5)


def test_optimizer_state_survives_a_round_trip() -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    config = resolve({"train": {"steps": 10}})

    def step(engine: TorchEngine, number: int) -> None:
        torch.manual_seed(number)
        engine.backward_and_step(engine.module(torch.randn(4, 3)).square().mean(), number)

    torch.manual_seed(0)
    first = TorchEngine(EngineContext(torch.nn.Linear(3, 2), config, ranks, 10))
    for number in range(3):
        step(first, number)
    second = TorchEngine(EngineContext(torch.nn.Linear(3, 2), config, ranks, 10))
    moments = {f"{key}/{n}": m for key, pieces in first.moments().items() for n, m in pieces.items()}
    second.load(first.weights(), moments | first.scalars())
    for engine in (first, second):
        step(engine, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.weights().values(), second.weights().values(), strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
@pytest.mark.parametrize(
    "settings", [{}, {"grad_clip": 0.01}, {"precision": "fp16"}, {"precision": "fp16", "grad_clip": 0.01}]
)
def test_the_norm_of_the_gradient_is_that_of_the_loss_before_clipping(optimizer: str, settings: dict[str, Any]) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    config = resolve({"train": {"steps": 10, "optimizer": optimizer, **settings}})
    torch.manual_seed(0)
    engine = TorchEngine(EngineContext(torch.nn.Linear(3, 2), config, ranks, 10))
    assert engine.gradient_norm() is None
    images = torch.randn(4, 3)
    loss = engine.module(images).square().mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(engine.module.parameters()))]).norm()
    engine.backward_and_step(engine.module(images).square().mean(), 0)
    assert engine.gradient_norm() == pytest.approx(float(expected), rel=1e-3)
