"""Conditioning images of training: made of the image that is shown, flipped with it, and refused where ignored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from udddm import objectives
from udddm.config import resolve
from udddm.config.run import RunConfig
from udddm.data import ImageDataset
from udddm.diffusion import known, schedule
from udddm.diffusion.conditions import HIDDEN
from udddm.errors import ConfigError, DataError
from udddm.objectives.loss import visit_loss
from udddm.order import Order
from udddm.runs.conditions import conditions_of, sample_conditions
from udddm.testing.models import random_model
from udddm.training.inputs import InputBuilder, StepInput

SHAPE = (3, 8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), dtype=np.uint8)
OTHERS = 255 - PIXELS
CHANNELS = {"condition": "channels"}


class Pairs:
    """Every image with its negative."""

    def __init__(self, labels: bool = False, shape: tuple[int, ...] = SHAPE, missing: int = -1):
        self.labels, self.shape, self.missing = labels, shape, missing

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> Any:
        other = OTHERS[index].reshape(-1)[: int(np.prod(self.shape))].reshape(self.shape)
        if index == self.missing:
            return PIXELS[index], 1
        return (PIXELS[index], other, index % 10) if self.labels else (PIXELS[index], other)


def config_of(condition: dict[str, Any], **sections: Any) -> RunConfig:
    data = {"condition": condition, "flip": True}
    tree = {"data": data, "network": CHANNELS, "objective": {"name": "ect"}, "train": {"steps": 4, "batch_size": 32}}
    return resolve(tree | sections)


def inputs_of(config: RunConfig, dataset: ImageDataset) -> tuple[npt.NDArray[np.int64], list[StepInput]]:
    order = Order.build(config.order, 0, 64, 32, SHAPE)
    objective = objectives.build(config, schedule.build(config.schedule), 4, SHAPE)
    trained = order, order.lanes_of(0, 1), dataset, objective
    return order.batch_of(order.lanes_of(0, 1), 0, 0).ids, InputBuilder.of(trained, config, torch.device("cpu")).build(
        0
    )


def test_a_pair_is_flipped_together_and_its_label_stays() -> None:
    dataset = ImageDataset(Pairs(labels=True))
    assert dataset.paired and dataset.labelled and dataset.shape == SHAPE
    ids, (step,) = inputs_of(config_of({"kind": "pairs"}, network={**CHANNELS, "classes": 10}), dataset)
    conditions = step.visits.condition_images
    assert step.visits.condition == "data" and conditions is not None
    assert step.labels is not None and np.array_equal(step.labels, ids % 10)
    assert torch.allclose(conditions, -step.images, atol=1e-6)
    original = torch.from_numpy(PIXELS[ids] / 127.5 - 1).float()
    as_is = (step.images - original).abs().amax((1, 2, 3)) < 1e-6
    mirrored = (step.images.flip(3) - original).abs().amax((1, 2, 3)) < 1e-6
    assert as_is.any() and mirrored.any() and (as_is ^ mirrored).all()
    assert torch.allclose(dataset.batch(ids)[0], original, atol=1e-6)  # what evaluation reads


@pytest.mark.parametrize("condition", [{"kind": "downscale", "factor": 4}, {"kind": "gray"}, {"kind": "mask"}])
def test_a_condition_is_made_of_the_image_that_is_shown(condition: dict[str, Any]) -> None:
    _, (step,) = inputs_of(config_of(condition), ImageDataset(list(PIXELS)))
    found = step.visits.condition_images
    assert found is not None and found.shape == step.images.shape
    if condition["kind"] == "downscale":
        blocks = found.reshape(-1, 3, 2, 4, 2, 4)
        assert (blocks == blocks[:, :, :, :1, :, :1]).all()
        assert torch.allclose(blocks[:, :, :, 0, :, 0], step.images.reshape(blocks.shape).mean((3, 5)), atol=1e-6)
    elif condition["kind"] == "gray":
        assert torch.equal(found, known.luma(step.images).expand_as(found))
    else:
        hidden = found == HIDDEN
        assert torch.equal(found[~hidden], step.images[~hidden])
        assert (hidden == hidden[:, :1]).all()  # in all channels
        sides = [hidden[:, 0].any(axis).sum(1) for axis in (1, 2)]
        assert all(side.min() == 2 and side.max() == 4 for side in sides)  # up to half of 8 pixels
        assert torch.equal(hidden[:, 0].sum((1, 2)), sides[0] * sides[1])  # a rectangle
        assert len({tuple(each.flatten().tolist()) for each in hidden[:, 0]}) > 10


def test_a_hidden_rectangle_is_a_function_of_the_visit() -> None:
    config, dataset = config_of({"kind": "mask", "largest": 0.9}), ImageDataset(list(PIXELS))
    (_, (one,)), (_, (two,)) = inputs_of(config, dataset), inputs_of(config, dataset)
    parts = config.model_copy(update={"train": config.train.model_copy(update={"grad_accumulation": 4})})
    _, split = inputs_of(parts, dataset)
    images = one.visits.condition_images
    assert (
        images is not None
        and two.visits.condition_images is not None
        and torch.equal(images, two.visits.condition_images)
    )
    joined = [part.visits.condition_images for part in split]
    assert torch.equal(torch.cat([each for each in joined if each is not None]), images)


def test_the_loss_depends_on_the_condition() -> None:
    _, (step,) = inputs_of(config_of({"kind": "pairs"}), ImageDataset(Pairs()))
    network = random_model("network.condition=channels", "network.classes=0", shape=SHAPE).network
    images = step.visits.condition_images
    assert images is not None
    losses = [
        visit_loss(network, step.images, step.images, visits)[0]
        for visits in (step.visits, _with_images(step, images.flip(0)))
    ]
    assert not torch.equal(*losses)


def _with_images(step: StepInput, images: torch.Tensor) -> Any:
    from dataclasses import replace

    return replace(step.visits, condition_images=images)


def test_samples_during_training_have_the_conditions_of_the_first_images() -> None:
    rows = sample_conditions(config_of({"kind": "pairs"}), ImageDataset(Pairs()), [1, 65, 2])
    assert rows is not None
    found = rows([0, 1, 2])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert np.allclose(found[2], OTHERS[2] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "network", "message"),
    [
        ({"name": "uddm"}, CHANNELS, "the objective conditions the network on the x0-state"),
        (
            {"name": "ict", "refined": {"share": 0.5, "use": "condition"}},
            CHANNELS,
            r"on an estimate \(objective.refined.use=condition\)",
        ),
        ({"name": "ect"}, {"condition": "none"}, "needs a network that takes a conditioning image"),
    ],
)
def test_a_slot_that_is_taken_is_one_error(objective: dict[str, Any], network: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config = config_of({"kind": "gray"}, objective=objective, network=network)
        objectives.build(config, schedule.build(config.schedule), 4, SHAPE)


@pytest.mark.parametrize("name", ["chain", "ict", "ect", "edm"])
def test_every_objective_that_leaves_the_slot_to_noise_takes_a_condition(name: str) -> None:
    config = config_of({"kind": "gray"}, objective={"name": name})
    built = objectives.build(config, schedule.build(config.schedule), 4, SHAPE)
    for epoch in range(4):
        visits = built.plan(np.arange(8), epoch)
        assert visits.conditioned_on(torch.zeros(8, *SHAPE)).condition == "data"


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"kind": "downscale"}, "needs factor, such as 4"),
        ({"kind": "gray", "factor": 4}, "factor is for kind 'downscale', not 'gray'"),
        ({"kind": "downscale", "factor": 4, "largest": 0.5}, "largest is for kind 'mask'"),
        ({"factor": 4}, "factor is for kind 'downscale', not 'none'"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(condition: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(condition)


@pytest.mark.parametrize(
    ("condition", "data", "message"),
    [
        ({"kind": "pairs"}, list(PIXELS), "have no conditioning image; its dataset"),
        ({"kind": "gray"}, Pairs(), "kind=gray would ignore the second one"),
        ({}, Pairs(), "kind=none would ignore the second one"),
        ({"kind": "gray"}, list(PIXELS[:, :1]), "gray is for RGB images.* 1 channel"),
        ({"kind": "downscale", "factor": 3}, list(PIXELS), "factor 3: .* divide 8x8 pixels; give one of 2, 4, 8"),
    ],
)
def test_a_data_set_that_does_not_fit_is_one_error(condition: dict[str, Any], data: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        conditions_of(config_of(condition), ImageDataset(data))


def test_a_pair_that_differs_from_the_first_names_its_sample() -> None:
    with pytest.raises(DataError, match="conditioning image of sample 0 is 3x8x4, but the images are 3x8x8"):
        ImageDataset(Pairs(shape=(3, 8, 4)))
    with pytest.raises(DataError, match="sample 5 has no conditioning image, but sample 0 has one"):
        ImageDataset(Pairs(missing=5)).batch(np.array([4, 5]))


def test_changed_conditions_are_changed_data() -> None:
    before, after = ImageDataset(Pairs()).fingerprint(), ImageDataset(Pairs()).fingerprint()
    assert before == after
    changed = Pairs()
    changed.__class__ = type("Changed", (Pairs,), {"__getitem__": lambda self, i: (PIXELS[i], PIXELS[i])})
    assert ImageDataset(changed).fingerprint() != before
