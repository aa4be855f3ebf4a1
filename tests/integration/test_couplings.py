"""benchmarks/quality/couplings.py: noise that is chosen for the images, by the plug point of objectives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm import objectives, rng
from udddm.config import DataConfig, resolve
from udddm.data import ImageDataset, load_dataset
from udddm.diffusion import schedule
from udddm.objectives.base import Objective
from udddm.rng import Stream

SHAPE = (1, 8, 8)
IDS = np.arange(5, 69)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "quality")
    monkeypatch.delitem(sys.modules, "couplings", raising=False)


def built(name: str, **settings: Any) -> Objective:
    tree = {"seed": 4, "objective": {"name": name, "settings": settings}, "network": {"condition": "none"}}
    config = resolve(tree)
    return objectives.build(config, schedule.build(config.schedule), 40, SHAPE)


def images() -> torch.Tensor:
    return ImageDataset(load_dataset(DataConfig(name="digits"))).batch(IDS)[0]


def distances(keys: torch.Tensor) -> torch.Tensor:
    return (rng.normal(keys, SHAPE) - images()).flatten(1).square().sum(1)


def test_best_of_k_takes_the_nearest_noise_and_is_a_function_of_the_sample() -> None:
    one = built("couplings:BestOfK", k=8)
    visits = one.plan(IDS, 7)
    drawn = torch.stack([rng.as_tensor(rng.keys(4, Stream.NOISE, IDS, 7, i)) for i in range(8)])
    every = torch.stack([distances(keys) for keys in drawn])
    assert (visits.noise_key == drawn).any(0).all()
    assert torch.equal(distances(visits.noise_key), every.amin(0)) and not torch.equal(visits.noise_key, drawn[0])
    some = np.array([40, 2, 17])
    assert torch.equal(one.plan(IDS[some], 7).noise_key, visits.noise_key[some])
    plain = built("ict").plan(IDS, 7)  # all else is iCT
    assert torch.equal(visits.coefficients, plain.coefficients) and torch.equal(visits.weight, plain.weight)


def test_batch_ot_pairs_the_noises_of_the_batch_with_the_least_distance() -> None:
    one, plain = built("couplings:BatchOT"), built("ict").plan(IDS, 7)
    visits = one.plan(IDS, 7)
    assert torch.equal(
        visits.noise_key.sort().values, plain.noise_key.sort().values
    )  # the noise is distributed as in iCT
    least = distances(visits.noise_key).sum()
    generator = torch.Generator().manual_seed(0)
    assert all(least < distances(plain.noise_key[torch.randperm(64, generator=generator)]).sum() for _ in range(50))
    for i, j in ((0, 1), (3, 60), (20, 41)):  # no exchange of two noises makes it less
        keys = visits.noise_key.clone()
        keys[[i, j]] = keys[[j, i]]
        assert distances(keys).sum() >= least
    assert torch.equal(built("couplings:BatchOT").plan(IDS, 7).noise_key, visits.noise_key)
    assert not torch.equal(one.plan(IDS[:32], 7).noise_key, visits.noise_key[:32])  # it is a function of the batch
