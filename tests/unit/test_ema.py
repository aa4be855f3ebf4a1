"""Exponential moving averages, compared with their closed form in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from udddm.ema import EMA


def trained(decay: float, steps: int, warmup: bool = False) -> tuple[EMA, list[torch.Tensor], nn.Linear]:
    """An EMA after `steps` updates, and the weights at steps 0, 1, ..., steps."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(4, 3)
    nn.init.normal_(module.weight, generator=generator)
    ema = EMA(dict(module.named_parameters()), decay, warmup)
    seen = [module.weight.detach().clone()]
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.add_(torch.randn(3, 4, generator=generator))
        ema.update(step)
        seen.append(module.weight.detach().clone())
    return ema, seen, module


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("steps", [0, 1, 2, 100])
def test_average_is_the_geometric_sum_of_all_weights_so_far(decay: float, steps: int) -> None:
    """decay^n p_0 + (1 - decay) sum_k decay^(n-k) p_k."""
    ema, seen, _ = trained(decay, steps)
    expected = decay**steps * seen[0].double()
    for k in range(1, steps + 1):
        expected += (1 - decay) * decay ** (steps - k) * seen[k].double()
    torch.testing.assert_close(ema.weights["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_warm_up_limits_the_decay_to_1_plus_step_over_10_plus_step() -> None:
    ema, seen, _ = trained(0.9, 200, warmup=True)
    expected = seen[0].double()
    for step in range(1, 201):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * seen[step].double()
    torch.testing.assert_close(ema.weights["weight"].double(), expected, rtol=1e-5, atol=1e-5)
    other, _, _ = trained(0.9, 200)
    assert torch.allclose(other.weights["weight"], ema.weights["weight"], atol=1e-3)  # 80 steps have passed since 0.9
    short, seen, _ = trained(0.9999, 1, warmup=True)
    torch.testing.assert_close(short.weights["weight"], 2 / 11 * seen[0] + 9 / 11 * seen[1])


def test_average_covers_every_parameter_and_is_a_copy_in_float32() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False)).bfloat16()
    ema = EMA(dict(module.named_parameters()), 0.9)
    before = {name: p.detach().float().clone() for name, p in module.named_parameters()}
    assert set(ema.weights) == set(before)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    for name, weight in ema.weights.items():
        assert weight.dtype == torch.float32 and not weight.requires_grad
        assert torch.equal(weight, before[name])


def test_updates_do_not_change_the_module() -> None:
    ema, seen, module = trained(0.5, 5)
    assert torch.equal(module.weight, seen[-1])
    assert module.weight.grad is None and module.weight.requires_grad
    assert not ema.weights["weight"].requires_grad


def test_small_steps_are_not_lost_to_rounding_in_low_precision() -> None:
    """The average of a bfloat16 module changes by less than the resolution of bfloat16."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema = EMA(dict(module.named_parameters()), 0.9999)
    with torch.no_grad():
        module.weight.fill_(1.5)
    for step in range(1, 101):
        ema.update(step)
    assert float(ema.weights["weight"]) == pytest.approx(1 + 0.5 * (1 - 0.9999**100), rel=1e-5)
