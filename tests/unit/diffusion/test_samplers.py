"""Algorithm 2 and renoising: the inputs of the network, and that an image depends only on its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from udddm import rng
from udddm.config import NetworkConfig, ScheduleConfig
from udddm.diffusion import samplers
from udddm.diffusion.schedule import NoiseSchedule, build
from udddm.networks import build as build_network
from udddm.networks.unet import UNet
from udddm.rng import Stream

SHAPE = (1, 8, 8)
Sampler = str
SAMPLERS = pytest.mark.parametrize("name", ["algorithm-2", "renoise"])
SCHEDULES = pytest.mark.parametrize(
    "schedule", [build(ScheduleConfig(kind="vp", timesteps=8000)), build(ScheduleConfig(kind="ve"))], ids=["vp", "ve"]
)


class Recorder(nn.Module):
    """A network that records its inputs and depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, condition: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.inputs.append((x, level, condition, labels))
        return torch.tanh(0.3 * x + 0.5 * condition + level[:, None, None, None])


def draw(stream: Stream, seeds: torch.Tensor, *parts: int) -> torch.Tensor:
    return rng.normal(rng.as_tensor(rng.keys(0, stream, seeds.numpy(), *parts)), SHAPE)


def combine(schedule: NoiseSchedule, t: float, xt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    _, _, skip, out, _, _ = schedule.coefficients(np.array([t]))[:, 0].tolist()
    return skip * xt + out * answer


def unet(condition: str = "cross-attention", classes: int = 0) -> UNet:
    """A small network whose zero-initialized layers are randomized, so that all inputs have an effect."""
    config = NetworkConfig.model_validate(
        {
            "base_channels": 8,
            "channel_mult": (1, 2),
            "blocks_per_level": 1,
            "attention_resolutions": (4,),
            "condition": condition,
            "classes": classes,
        }
    )
    network = build_network(config, SHAPE, max_frequency=16.0, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


@SCHEDULES
def test_algorithm_2_keeps_x_t_and_feeds_the_estimate_back(schedule: NoiseSchedule) -> None:
    network, seeds = Recorder(), torch.tensor([3, 1, 4])
    estimate = samplers.sample(
        network, schedule, SHAPE, seeds, options=samplers.SamplingOptions(steps=4, sampler="algorithm-2")
    )
    assert len(network.inputs) == 4
    sigma, c_in, c_noise = schedule.coefficients(np.array([schedule.last]))[[1, 4, 5], 0].tolist()
    xt = sigma * draw(Stream.SAMPLE_NOISE, seeds)
    condition = draw(Stream.SAMPLE_CONDITION, seeds)
    for x, level, given, _ in network.inputs:
        torch.testing.assert_close(x, c_in * xt)
        torch.testing.assert_close(level, torch.full((3,), c_noise))
        torch.testing.assert_close(given, condition)
        answer = torch.tanh(0.3 * x + 0.5 * given + level[:, None, None, None])
        condition = combine(schedule, schedule.last, xt, answer)
    torch.testing.assert_close(estimate, condition)


def test_x_t_has_the_standard_deviation_of_the_last_step() -> None:
    for kind, expected in (("vp", 1.0), ("ve", 50.0)):
        schedule = build(ScheduleConfig(kind=kind, timesteps=1000, preconditioning="paper"))
        network = Recorder()
        samplers.sample(network, schedule, SHAPE, torch.arange(400), options=samplers.SamplingOptions(steps=1))
        x = network.inputs[0][0] / float(schedule.coefficients(np.array([schedule.last]))[4, 0])
        assert float(x.std()) == pytest.approx(expected, rel=0.02)
        assert float(network.inputs[0][2].std()) == pytest.approx(1, rel=0.02)


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_renoise_levels_fall_from_0_8_and_stay_above_the_lowest(schedule: NoiseSchedule, steps: int) -> None:
    times = samplers.renoise_times(schedule, steps)
    assert len(times) == steps - 1
    sigma = schedule.sigma(np.array([schedule.last, *times]))
    assert (np.diff(sigma) < 0).all() and (sigma > schedule.sigma(np.array(1.0))).all()
    if steps > 1:
        assert sigma[1] == pytest.approx(0.8, rel=1e-3)


@SCHEDULES
def test_renoise_adds_new_noise_to_the_estimate_at_each_level(schedule: NoiseSchedule) -> None:
    network, seeds = Recorder(), torch.tensor([3, 1, 4])
    estimate = samplers.sample(
        network, schedule, SHAPE, seeds, options=samplers.SamplingOptions(steps=3, sampler="renoise")
    )
    assert len(network.inputs) == 3
    times = [schedule.last, *samplers.renoise_times(schedule, 3)]
    expected = torch.zeros(3, *SHAPE)
    for step, (t, (x, level, given, _)) in enumerate(zip(times, network.inputs, strict=True)):
        alpha, sigma, _, _, c_in, c_noise = schedule.coefficients(np.array([t]))[:, 0].tolist()
        eps = draw(Stream.SAMPLE_RENOISE, seeds, step) if step else draw(Stream.SAMPLE_NOISE, seeds)
        xt = sigma * eps + (alpha * expected if step else 0)
        torch.testing.assert_close(x, c_in * xt)
        torch.testing.assert_close(level, torch.full((3,), c_noise))
        torch.testing.assert_close(given, draw(Stream.SAMPLE_CONDITION, seeds, *([step] if step else [])))
        expected = combine(schedule, t, xt, torch.tanh(0.3 * x + 0.5 * given + level[:, None, None, None]))
    torch.testing.assert_close(estimate, expected)


@SCHEDULES
def test_one_step_is_the_same_for_both_samplers(schedule: NoiseSchedule) -> None:
    seeds = torch.arange(5)
    one, other = (
        samplers.sample(unet(), schedule, SHAPE, seeds, options=samplers.SamplingOptions(sampler=name))
        for name in ("algorithm-2", "renoise")
    )
    assert torch.equal(one, other)


@SAMPLERS
@pytest.mark.parametrize("condition", ["none", "cross-attention"])
def test_an_image_depends_on_its_seed_alone(name: Sampler, condition: str) -> None:
    """Bit for bit, whatever the other seeds of the batch, their order and their number."""
    schedule, network = build(ScheduleConfig()), unet(condition)

    def images(seeds: list[int]) -> dict[int, torch.Tensor]:
        drawn = samplers.batches(
            network, schedule, SHAPE, seeds, options=samplers.SamplingOptions(batch=4, steps=2, sampler=name)
        )
        return dict(zip(seeds, torch.cat(list(drawn)), strict=True))

    whole = images(list(range(11)))
    assert len({image.numpy().tobytes() for image in whole.values()}) == 11
    for seeds in ([0], [10], [7, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [2, 100, 5, 10**9, 0], list(range(5, 11))):
        for seed, image in images(seeds).items():
            if seed in whole:
                assert torch.equal(image, whole[seed]), seed


def test_the_batch_size_changes_nothing_but_rounding() -> None:
    schedule, network = build(ScheduleConfig()), unet()
    seeds = list(range(10))
    drawn = [
        torch.cat(
            list(samplers.batches(network, schedule, SHAPE, seeds, options=samplers.SamplingOptions(batch=b, steps=3)))
        )
        for b in (1, 3, 10, 64)
    ]
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "calls"), [(1, [1]), (250, [250]), (251, [250, 1])])
def test_without_a_batch_size_the_network_receives_what_is_asked_for(count: int, calls: list[int]) -> None:
    network = Recorder()
    options = samplers.SamplingOptions(batch=None)
    drawn = torch.cat(
        list(samplers.batches(network, build(ScheduleConfig()), SHAPE, list(range(count)), None, options))
    )
    assert [len(inputs[0]) for inputs in network.inputs] == calls
    expected = samplers.sample(Recorder(), build(ScheduleConfig()), SHAPE, torch.arange(count))
    torch.testing.assert_close(drawn, expected)


def test_batches_give_every_seed_once_in_order_and_no_padding() -> None:
    schedule, network = build(ScheduleConfig()), Recorder()
    seeds = [5, 3, 9, 9, 1, 0, 12]
    drawn = list(samplers.batches(network, schedule, SHAPE, seeds, options=samplers.SamplingOptions(batch=3)))
    assert [len(part) for part in drawn] == [3, 3, 1]
    assert [len(inputs[0]) for inputs in network.inputs] == [3, 3, 3]  # the network always receives the same shape
    expected = samplers.sample(Recorder(), schedule, SHAPE, torch.tensor(seeds))
    torch.testing.assert_close(torch.cat(drawn), expected)
    assert list(samplers.batches(network, schedule, SHAPE, [], options=samplers.SamplingOptions(batch=3))) == []


def test_labels_stay_with_their_seeds_in_padded_batches() -> None:
    schedule, network = build(ScheduleConfig()), Recorder()
    list(
        samplers.batches(
            network,
            schedule,
            SHAPE,
            [1, 2, 3, 4, 5],
            labels=[7, 8, 9, 6, 5],
            options=samplers.SamplingOptions(batch=3, steps=2),
        )
    )
    seen = [labels.tolist() for *_, labels in network.inputs if labels is not None]
    assert seen == [[7, 8, 9], [7, 8, 9], [6, 5, 6], [6, 5, 6]]
    one, other = (
        torch.cat(
            list(
                samplers.batches(
                    unet(classes=3), schedule, SHAPE, [1, 2], labels=labels, options=samplers.SamplingOptions(batch=2)
                )
            )
        )
        for labels in ([0, 1], [0, 2])
    )
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


class Labeled(nn.Module):
    """Depends on labels (class 5 if there are none) and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, condition: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        self.calls += 1
        chosen = torch.full((len(x),), 5) if labels is None else labels
        return torch.tanh(0.3 * x + 0.5 * condition + (level + chosen)[:, None, None, None])


@SCHEDULES
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_guidance_extrapolates_from_no_label_to_the_label(schedule: NoiseSchedule, weight: float) -> None:
    network, seeds, labels = Labeled(), torch.tensor([3, 1, 4]), torch.tensor([0, 2, 1])
    guided = samplers.sample(
        network, schedule, SHAPE, seeds, labels=labels, options=samplers.SamplingOptions(guidance=weight)
    )
    assert network.calls == (1 if weight == 1 else 2)
    sigma, c_in, level = schedule.coefficients(np.array([schedule.last]))[[1, 4, 5], 0].tolist()
    xt, condition = sigma * draw(Stream.SAMPLE_NOISE, seeds), draw(Stream.SAMPLE_CONDITION, seeds)

    def f(label: torch.Tensor) -> torch.Tensor:
        answer = torch.tanh(0.3 * c_in * xt + 0.5 * condition + (level + label)[:, None, None, None])
        return combine(schedule, schedule.last, xt, answer)

    none = f(torch.tensor([5, 5, 5]))
    torch.testing.assert_close(guided, none + weight * (f(labels) - none), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["algorithm-2", "renoise", "heun"])
def test_every_evaluation_of_every_sampler_is_guided(name: str) -> None:
    """Weight 1 equals plain sampling in bits and calls, 0 is sampling without labels; other weights take two calls."""
    schedule, network, seeds = build(ScheduleConfig()), Labeled(), [1, 2, 3, 4, 5]

    def drawn(guidance: float, labels: list[int] | None) -> torch.Tensor:
        network.calls = 0
        made = samplers.batches(
            network,
            schedule,
            SHAPE,
            seeds,
            labels=labels,
            options=samplers.SamplingOptions(batch=5, steps=3, sampler=name, guidance=guidance),
        )
        return torch.cat(list(made))

    labels = [0, 1, 2, 0, 1]
    plain = torch.cat(
        list(
            samplers.batches(
                network,
                schedule,
                SHAPE,
                seeds,
                labels=labels,
                options=samplers.SamplingOptions(batch=5, steps=3, sampler=name),
            )
        )
    )
    assert network.calls == 3
    assert torch.equal(drawn(1.0, labels), plain) and network.calls == 3
    torch.testing.assert_close(drawn(0.0, labels), drawn(1.0, None))
    assert not torch.allclose(drawn(2.0, labels), plain) and network.calls == 6


def test_guidance_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance 2 needs labels"):
        samplers.sample(
            Recorder(), build(ScheduleConfig()), SHAPE, torch.arange(2), options=samplers.SamplingOptions(guidance=2)
        )


@SAMPLERS
def test_fewer_than_one_step_is_refused(name: Sampler) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        samplers.sample(
            Recorder(),
            build(ScheduleConfig()),
            SHAPE,
            torch.arange(2),
            options=samplers.SamplingOptions(steps=0, sampler=name),
        )
