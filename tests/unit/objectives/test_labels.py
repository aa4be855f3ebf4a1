"""Label dropout: the visits without a label, its consistency within chains, and resuming a run that uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udddm import objectives
from udddm.config import RunConfig, resolve
from udddm.data import ImageDataset
from udddm.diffusion.schedule import build
from udddm.errors import ConfigError
from udddm.objectives import LabelDropout
from udddm.objectives.chain import Chain
from udddm.order import Order
from udddm.training.inputs import InputBuilder

SHAPE = (1, 8, 8)
IDS = np.arange(3000)
NAMES = ["chain", "uddm", "ict", "ect", "edm"]


def config(name: str = "chain", share: float = 0.2, seed: int = 0, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "seed": seed,
        "network": {
            "base_channels": 8,
            "channel_mult": [1],
            "blocks_per_level": 1,
            "attention_resolutions": [],
            "dropout": 0.1,
            "classes": 10,
        },
        "objective": {"name": name},
        "train": {"steps": 24, "batch_size": 256, "torch_threads": 1},
        "sample": {"every_steps": 0},
    }
    for key, values in sections.items():
        tree[key] = {**tree.get(key, {}), **values}
    tree["network"]["label_dropout"] = share
    return resolve(tree)


def dropped(ids: np.ndarray, epoch: int, chosen: RunConfig) -> np.ndarray:
    planned = objectives.build(chosen, build(chosen.schedule), 40, SHAPE).plan(ids, epoch)
    return LabelDropout.of(chosen).drops(planned)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_dropped_fraction_is_configured_and_the_visits_depend_on_epoch_and_seed(name: str, share: float) -> None:
    first = dropped(IDS, 3, config(name, share))
    assert abs(first.mean() - share) < 4.5 * np.sqrt(share * (1 - share) / len(IDS))
    for other in (dropped(IDS, 9, config(name, share)), dropped(IDS, 3, config(name, share, seed=1))):
        both = (first & other).mean()  # independent: p squared
        assert abs(both - share**2) < 0.03


@pytest.mark.parametrize("length", [2, 5, "trajectory"])
def test_all_visits_of_a_chain_have_the_label_or_none_has(length: int | str) -> None:
    chosen = config(share=0.4, objective={"chain": {"length": length}})
    chain = objectives.build(chosen, build(chosen.schedule), 40, SHAPE)
    assert isinstance(chain, Chain)
    without: dict[tuple[int, int, int], set[bool]] = {}
    for epoch in range(40):
        stage, number, *_ = chain.position(IDS, epoch)
        for sample, link, drop in zip(IDS, number, dropped(IDS, epoch, chosen), strict=True):
            without.setdefault((int(sample), stage, int(link)), set()).add(bool(drop))
    assert all(len(seen) == 1 for seen in without.values())
    assert abs(np.mean([True in seen for seen in without.values()]) - 0.4) < 0.03


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40), st.integers(0, 39), st.sampled_from(NAMES), st.data())
def test_dropped_labels_do_not_depend_on_the_split_of_the_samples(
    ids: list[int], epoch: int, name: str, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    chosen, array = config(name, 0.5), np.array(ids)
    parts = [dropped(part, epoch, chosen) for part in (array[:cut], array[cut:]) if len(part)]
    assert np.array_equal(np.concatenate(parts), dropped(array, epoch, chosen))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_inputs_of_a_step_have_the_label_for_none_where_dropped(share: float) -> None:
    images = np.zeros((64, 1, 8, 8), np.float32)
    labels = np.arange(64) % 10
    dataset = ImageDataset([(image, label) for image, label in zip(images, labels, strict=True)])
    chosen = config(share=share, train={"batch_size": 64})
    order = Order.build(chosen.order, 0, 64, 64, SHAPE)
    lanes = order.lanes_of(0, 1)
    made = objectives.build(chosen, build(chosen.schedule), 40, SHAPE)
    device = torch.device("cpu")
    builder = InputBuilder(order, lanes, dataset, made, device, LabelDropout.of(chosen), parts=2)
    seen = torch.cat([part.labels for part in builder.build(0) if part.labels is not None])
    ids = order.batch_of(lanes, 0, 0).ids
    drop = dropped(ids, 0, chosen)
    assert np.array_equal(seen.numpy(), np.where(drop, 10, labels[ids]))
    assert bool(drop.any()) == (share > 0)
    assert dataset.batch(ids)[1].tolist() == labels[ids].tolist()  # the labels of the data set are not modified


def test_label_dropout_and_guidance_need_labels() -> None:
    with pytest.raises(ConfigError, match=r"label_dropout 0.1.*set network.classes"):
        resolve({"network": {"label_dropout": 0.1}})
    with pytest.raises(ConfigError, match=r"network.label_dropout"):
        resolve({"network": {"classes": 10, "label_dropout": 1.0}})
    with pytest.raises(ConfigError, match=r"sample.guidance 2: .*network.classes is 0"):
        resolve({"sample": {"guidance": 2}})
    with pytest.raises(ConfigError, match=r"sample.guidance 2: .*network.label_dropout"):
        resolve({"sample": {"guidance": 2}, "network": {"classes": 10}})
    guided = resolve({"sample": {"guidance": 2}, "network": {"classes": 10, "label_dropout": 0.1}})
    with pytest.raises(ConfigError, match=r"--guidance nan: give a finite number"):
        guided.check_guidance(float("nan"), "--guidance")
