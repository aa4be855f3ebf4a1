"""Horizontal flips: half of the visits, one decision per chain, and only of the images that are trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from udddm import objectives
from udddm.config import resolve
from udddm.data import ImageDataset
from udddm.diffusion.schedule import build
from udddm.objectives import HorizontalFlips
from udddm.objectives.base import Objective
from udddm.order import Order
from udddm.training.inputs import InputBuilder

SHAPE = (1, 4, 4)
IDS = np.arange(2000)


def built(objective: dict[str, Any]) -> Objective:
    config = resolve({"seed": 3, "objective": objective, "network": {"condition": "none"}})
    return objectives.build(config, build(config.schedule), 60, SHAPE)


@pytest.mark.parametrize(
    "objective",
    [{"name": "ict", "refined": {"share": 0.5}}, {"name": "chain", "chain": {"length": 4}}],
    ids=["refined", "chain"],
)
def test_a_stored_estimate_and_the_image_of_its_next_visit_are_flipped_alike(objective: dict[str, Any]) -> None:
    one, flips = built(objective), HorizontalFlips(3)
    changed = []
    for epoch in range(31, 36):
        before, visits = one.plan(IDS, epoch - 1), one.plan(IDS, epoch)
        mirrored = flips.mirrored(visits)
        assert abs(mirrored.mean() - 0.5) < 0.05
        if visits.refined is not None:
            dependent = visits.refined.rows.numpy()
        else:
            assert visits.stored_rows is not None
            dependent = np.isin(IDS, visits.stored_rows.numpy())
        assert dependent.any() and (mirrored[dependent] == flips.mirrored(before)[dependent]).all()
        changed.append((mirrored[~dependent] != flips.mirrored(before)[~dependent]).mean())
    assert 0.3 < np.mean(changed) < 0.7  # other visits draw anew


def test_the_images_of_a_step_are_mirrored_and_those_of_the_data_set_are_not() -> None:
    pixels = np.random.default_rng(0).random((64, 1, 4, 4)).astype(np.float32)
    dataset, one = ImageDataset(list(pixels)), built({"name": "ict"})
    order = Order.build(resolve({}).order, 0, 64, 64, SHAPE)
    lanes, flips = order.lanes_of(0, 1), HorizontalFlips(3)
    builder = InputBuilder(order, lanes, dataset, one, torch.device("cpu"), None, flips, parts=2)
    inputs = builder.build(0)
    ids = order.batch_of(lanes, 0, 0).ids
    mirrored = flips.mirrored(one.plan(ids, 0))
    expected = np.where(mirrored[:, None, None, None], pixels[ids][..., ::-1], pixels[ids])
    assert np.array_equal(torch.cat([part.images for part in inputs]).numpy(), expected) and 10 < mirrored.sum() < 54
    assert np.array_equal(dataset.batch(ids)[0].numpy(), pixels[ids])
