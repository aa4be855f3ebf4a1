"""The inputs of a step reach a GPU in one copy, as they were built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import udddm
from udddm import objectives
from udddm.config import RunConfig, load_config
from udddm.data import ArrayImages, ImageDataset
from udddm.diffusion import schedule
from udddm.objectives.transfer import ALIGNMENT, Packed
from udddm.order import Order
from udddm.testing.runs import FINGERPRINTS, small_run
from udddm.training.inputs import InputBuilder, StepInput

SHAPE = (1, 8, 8)
SETTINGS = {
    "refined": ("objective={name: ict, pretrain: 0, refined: {share: 0.5, above: 0}}",),
    "denoiser": ("objective.name=edm",),
    "stored": ("objective={name: ect, pretrain: 0, ect: {length: 2}}",),
    "guidance": ("objective={name: ict, pretrain: 0, guidance: 2}", "network={classes: 10, label_dropout: 0.2}"),
    "condition": (
        "objective={name: ict, pretrain: 0}",
        "data.condition.kind=downscale",
        "data.condition.factor=2",
    ),
}


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def tensors(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif is_dataclass(value):
        for each in fields(value):
            yield from tensors(getattr(value, each.name), f"{name}.{each.name}")


def inputs(config: RunConfig, step: int) -> list[StepInput]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (96, *SHAPE), np.uint8)
    dataset = ImageDataset(ArrayImages(images, np.arange(96) % 10 if config.network.classes else None))
    order = Order.build(config.order, config.seed, len(dataset), config.train.batch_size, SHAPE)
    objective = objectives.build(config, schedule.build(config.schedule), 10.0, SHAPE)
    builder = InputBuilder.of((order, order.lanes_of(0, 1), dataset, objective), config, torch.device("cpu"))
    return builder.build(step)


@pytest.mark.parametrize("kind", SETTINGS)
def test_packed_inputs_are_the_same_after_one_copy(kind: str) -> None:
    base = ("train={steps: 100, batch_size: 32, grad_accumulation: 2}", "network.condition=none")
    wanted = "network.condition=channels" if kind == "condition" else "network.patch=1"
    config = load_config(None, [*base, *SETTINGS[kind], wanted])
    for built in inputs(config, 7):  # in the third epoch
        packed = Packed(built, pin=False)
        moved = packed.to(torch.device("cpu"))
        assert type(moved) is StepInput
        before, after = dict(tensors(built)), dict(tensors(moved))
        assert before.keys() == after.keys() and len(before) > 8
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
            assert after[name].data_ptr() % ALIGNMENT == 0 or not after[name].numel(), name
        assert len({tensor.untyped_storage().data_ptr() for tensor in after.values()}) == 1
        with Operations() as operations:
            elsewhere = packed.to(torch.device("meta"))
        assert all(tensor.is_meta for _, tensor in tensors(elsewhere))
        assert operations.found["_to_copy"] == 1 and not operations.found["copy_"]


def test_inputs_do_not_change_with_later_changes_of_what_was_packed() -> None:
    """The memory of a batch is its own."""
    (built,) = inputs(load_config(None, ["train={steps: 10, batch_size: 32}", "network.condition=none"]), 0)
    packed, images = Packed(built, pin=False), built.images.clone()
    built.images.zero_()
    assert torch.equal(packed.to(torch.device("cpu")).images, images)


def test_a_run_on_packed_inputs_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the page-locked memory."""
    images = np.random.default_rng(0).integers(0, 256, (96, *SHAPE), np.uint8)
    refined = {"name": "ict", "pretrain": 0.25, "ict": {"s1": 40}, "refined": {"share": 0.5}}
    config = small_run(refined, train={"steps": 16, "batch_size": 32, "grad_accumulation": 2, "torch_threads": 1})

    def packed(self: InputBuilder, step: int, read: Any = None) -> list[Packed[StepInput]]:
        return [Packed(part, pin=False) for part in self.build(step, read)]

    results = []
    for name in ("built", "packed"):
        results.append(udddm.train(config, ArrayImages(images), run_dir=tmp_path / name, device="cpu").to_dict())
        monkeypatch.setattr(InputBuilder, "packed", packed)
    assert [results[0][key] for key in FINGERPRINTS] == [results[1][key] for key in FINGERPRINTS]
