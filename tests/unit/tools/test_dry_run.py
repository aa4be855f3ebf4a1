"""Dry runs: the plan of every preset without its data, and the scaling of measured times."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from udddm import objectives
from udddm.backends.engines import memory
from udddm.config import RunConfig, load_config, presets
from udddm.data import expected
from udddm.diffusion import schedule
from udddm.errors import ConfigError, DataError
from udddm.networks import activations
from udddm.networks.cost import cost
from udddm.tools import dry_run, gpus, throughput
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
    for dtype, size in (("fp32", "1.1 GB"), ("fp16", "536.9 MB"), ("uint8", "268.4 MB")):
        settings = ["data={name: array, expect: {samples: 1048576, shape: [1, 16, 16]}}", f"store.dtype={dtype}"]
        lines = dry_run.plan(load_config(None, [*TINY, *settings]), "cpu")
        assert any(line.startswith(f"x0-state: {size} per generation in {dtype}") for line in lines)


def test_a_step_is_scaled_in_proportion_to_its_operations() -> None:
    measured = Speed(images=4, operations=100.0, passes=2.0, update=0.5)
    assert measured.step(100.0) == 2.5
    assert measured.step(1000.0) - measured.step(500.0) == pytest.approx(10.0)


def test_gpus_are_known_by_name() -> None:
    assert str(gpus.parse("8xH100")) == "8xH100" and gpus.parse("8 x nvidia h100").count == 8
    assert gpus.parse("rtx 4090") == gpus.GPUs(1, gpus.parse("RTX4090").kind)
    for name, kind in (
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("NVIDIA A10G", None),
    ):
        found = gpus.named(name)
        assert (found.name if found else None) == kind
    for text in ("8xH1000", "0xH100", "eight", "8x", ""):
        with pytest.raises(ConfigError, match=r"--gpus .*such as 8xH100. Known kinds: B200, H200"):
            gpus.parse(text)


def test_a_step_takes_its_operations_at_the_assumed_share_of_the_peak() -> None:
    eight = gpus.parse("8xH100")
    assert eight.step(8e15, "bf16") == pytest.approx(1e15 / (989e12 * throughput.UTILISATION))
    assert eight.step(8e15, "fp32") == pytest.approx(1e15 / (494e12 * throughput.UTILISATION))
    assert eight.step(8e9, "bf16") is None


def planned(*settings: str, on: str = "8xH100") -> list[str]:
    return dry_run.plan(load_config(None, [*TINY, *settings]), "cpu", on=gpus.parse(on))


def test_a_plan_has_five_lines() -> None:
    lines = planned("data.name=digits")
    assert [line.partition(":")[0] for line in lines] == ["data", "network", "memory", "x0-state", "time"]
    assert "no estimate for 8xH100: launching the kernels" in lines[4] and "measured here: 1 rank, cpu" in lines[4]


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a network that a CPU cannot measure in seconds. Nothing is measured."""
    monkeypatch.setattr(dry_run, "measure", lambda *_: Speed(images=1, operations=1e12, passes=1.0, update=0.5))
    return ["network.base_channels=128", "train.precision=bf16", "train.batch_size=4096", "train.steps=2000000"]


DATA = "data={name: array, expect: {samples: 1000000, shape: [3, 32, 32]}}"


def test_what_does_not_fit_names_the_accumulation_that_does(heavy: list[str]) -> None:
    found = planned(*heavy, DATA, on="1xT4")[2]
    parts = re.search(r"does not fit the 16.0 GB of a T4: set train.grad_accumulation=(\d+)", found)
    assert parts and 4096 % int(parts[1]) == 0
    fits = planned(*heavy, DATA, f"train.grad_accumulation={parts[1]}", on="1xT4")[2]
    assert "; fits the 16.0 GB of a T4" in fits
    fewer = max(n for n in range(1, int(parts[1])) if 4096 % n == 0)
    assert "does not fit" in planned(*heavy, DATA, f"train.grad_accumulation={fewer}", on="1xT4")[2]


def test_what_fits_when_it_is_computed_again_says_so(heavy: list[str]) -> None:
    micro = [*heavy, DATA, "train.batch_size=700"]
    found = planned(*micro, on="1xT4")[2]
    assert found.endswith("set train.grad_accumulation=2 or train.recompute=true")
    fits = planned(*micro, "train.recompute=true", on="1xT4")[2]
    assert "; fits the 16.0 GB of a T4" in fits


def test_what_cannot_fit_says_so(heavy: list[str]) -> None:
    huge = [*heavy[1:], "network.base_channels=4096"]
    assert "not even one image at a time" in planned(*huge, DATA, on="8xT4")[2]


def test_the_state_counts_where_the_store_keeps_it_on_the_gpu(heavy: list[str]) -> None:
    def fixed(*settings: str) -> float:
        found = re.search(r"per GPU: ([\d.]+) GB for weights", planned(*heavy, DATA, *settings)[2])
        assert found
        return float(found[1])

    stored = ("objective.name=chain", "store.dtype=fp32")
    assert fixed(*stored, "store.kind=gpu") - fixed(*stored, "store.kind=pinned") == pytest.approx(1.54, abs=0.11)


def test_a_run_that_takes_years_says_more_than_a_thousand_days(heavy: list[str]) -> None:
    found = planned(*heavy, DATA)[4]
    assert "more than 1,000 days here" in found and "year" not in found


MEASURED = {"cifar10": 49.5, "ffhq-64": 213.6, "imagenet-64": 322.1, "imagenet-256-latents": 104.6}


@pytest.mark.parametrize(("name", "measured"), MEASURED.items())
def test_counted_activations_are_those_measured_on_a_gpu(name: str, measured: float) -> None:
    """Megabytes per image, measured on an H200 (docs/gpu.md, P10)."""
    config = load_config(name)
    data = expected(config.data)
    assert data is not None
    counted = activations.bytes_per_image(config.network, data.shape, config.train.precision) / 1e6
    assert memory.ALLOCATED * counted == pytest.approx(measured, rel=0.02)


def test_float32_keeps_twice_the_bytes() -> None:
    network = load_config("cifar10").network
    half = activations.bytes_per_image(network, (3, 32, 32), "bf16")
    assert activations.bytes_per_image(network, (3, 32, 32), "fp32") == pytest.approx(2 * half, rel=0.05)


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
