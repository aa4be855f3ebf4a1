"""Dry runs: the plan of every preset without its data, and the scaling of measured times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import objectives
from udddm.config import RunConfig, load_config, presets
from udddm.data import expected
from udddm.diffusion import schedule
from udddm.errors import ConfigError, DataError
from udddm.networks.cost import cost
from udddm.tools import dry_run, throughput
from udddm.tools.throughput import Speed

TINY = [
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0, "
    "condition: none}",
    "train={steps: 6, batch_size: 64, learning_rate: 1.0e-3, ema: [0.9]}",
]


def teacher(config: RunConfig, samples: int, epochs: float, shape: tuple[int, int, int]) -> float:
    visit = objectives.build(config, schedule.build(config.schedule), epochs, shape)
    calls = objectives.teacher_of(config)
    return throughput.teacher_share(visit, calls, samples, epochs)


def test_untrained_presets_are_marked_as_such() -> None:
    for name in ("cifar10", "ffhq-64", "imagenet-64", "imagenet-256-latents"):
        assert "has not been trained" in presets.text_of(name)
        assert load_config(name).objective.name == "ect"


def test_the_state_is_samples_times_pixels_times_bytes() -> None:
    for dtype, size in (("fp32", "1.0 GiB"), ("fp16", "512.0 MiB"), ("uint8", "256.0 MiB")):
        settings = ["data={name: array, expect: {samples: 1048576, shape: [1, 16, 16]}}", f"store.dtype={dtype}"]
        lines = dry_run.plan(load_config(None, [*TINY, *settings]), "cpu")
        assert any(line.startswith(f"x0-state: {size} per generation in {dtype}") for line in lines)


def test_a_step_is_scaled_in_proportion_to_its_operations() -> None:
    measured = Speed(images=4, operations=100.0, passes=2.0, update=0.5)
    assert measured.step(100.0) == 2.5
    assert measured.step(1000.0) - measured.step(500.0) == pytest.approx(10.0)


def test_gpus_are_scaled_by_their_peak_and_others_by_the_assumption() -> None:
    measured = Speed(images=4, operations=1e15, passes=2.0, update=0.5)
    assert throughput.on_h100s(measured, 8e15, "bf16", "NVIDIA H100 80GB HBM3")[0] == pytest.approx(2.5)
    seconds, how = throughput.on_h100s(measured, 8e15, "bf16", "NVIDIA A100-SXM4-80GB")
    assert seconds == pytest.approx(2.5 * 312 / 989) and "scaled" in how
    for gpu in (None, "NVIDIA L40S"):
        seconds, how = throughput.on_h100s(measured, 8e15, "bf16", gpu)
        assert seconds == pytest.approx(1e15 / (989e12 * throughput.UTILISATION)) and "assumed" in how
    assert throughput.on_h100s(measured, 8e9, "bf16", None)[0] is None


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        (["objective.name=edm"], 0.0, 0.0),
        (["objective.chain.length=trajectory", "objective.chain.stages=[{start: 0, levels: 8}]"], 0.0, 0.0),
        (["objective.chain.length=1", "objective.chain.stages=[{start: 0, levels: 8}]"], 0.86, 0.92),
        (
            ["objective.chain.length=1", "objective.chain.stages=[{start: 0, levels: 8}]", "objective.pretrain=0.5"],
            0.4,
            0.5,
        ),
        (["objective.chain.length=4", "objective.chain.stages=[{start: 0, levels: 8}]"], 0.2, 0.3),
    ],
)
def test_the_teachers_share_is_averaged_over_the_run(settings: list[str], low: float, high: float) -> None:
    config = load_config(None, [*TINY, *settings])
    assert low <= teacher(config, 5000, 100.0, (1, 8, 8)) <= high


def test_a_measured_step_counts_the_teachers_passes_it_made() -> None:
    config = load_config(None, [*TINY, "data.name=digits", "objective.chain.length=1"])
    known = cost(config.network, (1, 8, 8))
    data = expected(config.data)
    assert data is not None
    order = dry_run.Order.build(config.order, 0, data.samples, 64, data.shape)
    visit = objectives.build(config, schedule.build(config.schedule), 10.0, data.shape)
    ranks = dry_run.join("cpu", 8)
    found = throughput.measure(config, data, order, ranks, 6, visit, known)
    assert found.images == 64
    calls = objectives.teacher_of(config)
    evaluated = calls.evaluated(visit.plan(order.batch_of(range(8), 0, 0).ids, 0))
    assert evaluated > 40 and found.operations == 64 * known.training + evaluated * known.forward
    assert found.passes > 0 and found.update > 0


def test_the_first_pass_is_not_counted_as_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass compiles, which takes minutes if train.compile is set."""
    config = load_config(None, [*TINY, "data.name=digits"])
    data = expected(config.data)
    assert data is not None
    order = dry_run.Order.build(config.order, 0, data.samples, 64, data.shape)
    visit = objectives.build(config, schedule.build(config.schedule), 10.0, data.shape)
    clock = [0.0]

    def slow(*arguments: Any) -> Any:
        clock[0] += 1.0 if clock[0] else 100.0
        return objectives.visit_loss(*arguments)

    monkeypatch.setattr(throughput, "visit_loss", slow)
    monkeypatch.setattr(throughput, "_now", lambda device: clock[0])
    ranks = dry_run.join("cpu", 8)
    assert throughput.measure(config, data, order, ranks, 6, visit, cost(config.network, (1, 8, 8))).passes == 1.0


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*TINY, "data.name=digits"])
    data = expected(config.data)
    assert data is not None
    order = dry_run.Order.build(config.order, 0, data.samples, 64, data.shape)
    visit = objectives.build(config, schedule.build(config.schedule), 10.0, data.shape)

    def small(network: nn.Module, x0: torch.Tensor, *rest: Any) -> Any:
        if len(x0) > 20:
            raise torch.OutOfMemoryError
        return objectives.visit_loss(network, x0, *rest)

    monkeypatch.setattr(throughput, "visit_loss", small)
    known = cost(config.network, (1, 8, 8))
    assert throughput.measure(config, data, order, dry_run.join("cpu", 8), 6, visit, known).images == 16


def test_a_dry_run_reads_the_data_at_the_given_path(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((64, 1, 8, 8), np.uint8))
    where = f"data={{name: array, path: {tmp_path / 'images.npy'}, expect: {{samples: SAMPLES, shape: [1, 8, 8]}}}}"
    assert (
        "64 images 1x8x8 (loaded)" in dry_run.plan(load_config(None, [*TINY, where.replace("SAMPLES", "64")]), "cpu")[0]
    )
    with pytest.raises(DataError, match="has 64 samples, not 65"):
        dry_run.plan(load_config(None, [*TINY, where.replace("SAMPLES", "65")]), "cpu")
    with pytest.raises(ConfigError, match="no labels"):
        dry_run.plan(load_config(None, [*TINY, where.replace("SAMPLES", "64"), "network.classes=3"]), "cpu")


def test_an_unknown_key_of_data_expect_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data.expect.sampels: unknown key; did you mean data.expect.samples\?"):
        load_config(None, ["data.expect={sampels: 3, samples: 3, shape: [1, 8, 8]}"])
