"""Zero-shot editing keeps what is known exactly, and depends on the seed only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udddm.diffusion import editing, known
from udddm.diffusion.editing import Colorize, Edit, Inpaint, Stroke, Upscale
from udddm.errors import ConfigError
from udddm.image_grid import to_uint8
from udddm.testing.models import random_model

GRAY, RGB = random_model("network.classes=0"), random_model("network.classes=0", shape=(3, 8, 8))
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:6, 1:5] = True
EXTREMES = np.random.default_rng(0).choice([0, 1, 7, 128, 254, 255], (4, 3, 8, 8)).astype(np.uint8)
"""Black and white are the values at which clamping an estimate would lose a mean."""


def test_known_pixels_have_the_bits_of_the_input() -> None:
    given_images = EXTREMES[:, :1]
    images = GRAY.edit(given_images, range(4), Inpaint(MASK), steps=5)
    pixels = to_uint8(torch.from_numpy(images)).transpose(0, 3, 1, 2)
    assert np.array_equal(pixels[:, :, ~MASK], given_images[:, :, ~MASK])
    floats = torch.rand(4, 1, 8, 8) * 2 - 1
    assert torch.equal(
        torch.from_numpy(GRAY.edit(floats, range(4), Inpaint(MASK), steps=5))[:, :, ~MASK], floats[:, :, ~MASK]
    )
    assert len(np.unique(pixels[:, :, MASK])) > 10


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_means_of_an_enlarged_image_are_the_input(factor: int) -> None:
    small = EXTREMES[:, :, : 8 // factor, : 8 // factor]
    images = torch.from_numpy(RGB.edit(small, range(4), Upscale(factor), steps=3))
    expected = torch.from_numpy(small) / 127.5 - 1
    assert (known.block_means(images, factor) - expected).abs().max() < 1e-6
    rounded = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).double()
    assert (known.block_means(rounded, factor) - torch.from_numpy(small)).abs().max() <= 0.5 + 1e-6
    assert images.abs().max() <= 1 and images.std() > 0.1


def test_the_luma_of_a_colored_image_is_the_input() -> None:
    gray = EXTREMES[:, :1]
    images = torch.from_numpy(RGB.edit(gray, range(4), Colorize(), steps=3))
    assert (known.luma(images) - (torch.from_numpy(gray) / 127.5 - 1)).abs().max() < 1e-6
    between = torch.from_numpy((gray > 5) & (gray < 250)).expand_as(images)
    assert (images - known.luma(images))[between].abs().max() > 0.1  # it has color


@given(data=st.data(), size=st.integers(1, 6))
@settings(max_examples=60)
def test_values_with_a_mean_are_the_nearest_ones(data: st.DataObject, size: int) -> None:
    number = st.floats(-3, 3, width=32)
    values = torch.tensor(data.draw(st.lists(number, min_size=size, max_size=size)))
    weights = torch.tensor(data.draw(st.lists(st.floats(0.1, 1), min_size=size, max_size=size)), dtype=torch.float64)
    weights /= weights.sum()
    other = torch.tensor(data.draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size)), dtype=torch.float64)
    target = (other * weights).sum()  # `other` is one of the images that have this mean
    found = known.with_mean(values.double(), weights, target)
    assert found.abs().max() <= 1 and abs(float((found * weights).sum() - target)) < 1e-9
    assert (found - values).norm() <= (other - values).norm() + 1e-6
    assert torch.allclose(known.with_mean(found, weights, target), found, atol=1e-9)


KINDS: list[tuple[Any, Edit, tuple[int, int, int]]] = [
    (GRAY, Inpaint(MASK), (1, 8, 8)),
    (GRAY, Upscale(2), (1, 4, 4)),
    (RGB, Colorize(), (1, 8, 8)),
    (RGB, Stroke(1.0), (3, 8, 8)),
]


@pytest.mark.parametrize(("model", "kind", "shape"), KINDS, ids=lambda each: getattr(each, "name", ""))
def test_an_edited_image_is_a_function_of_input_and_seed(model: Any, kind: Edit, shape: tuple[int, int, int]) -> None:
    images = torch.rand(5, *shape) * 2 - 1
    all_ = model.edit(images, range(5), kind, steps=4, batch=2)
    assert np.array_equal(model.edit(images[3:], [3, 4], kind, steps=4, batch=2), all_[3:])
    variants = model.edit(images[0], [0, 9], kind, steps=4, batch=2)
    assert np.array_equal(variants[0], all_[0]) and not np.array_equal(variants[1], all_[0])


def test_without_known_pixels_one_evaluation_is_a_sample() -> None:
    everything = Inpaint(torch.ones(8, 8, dtype=torch.bool))
    edited = GRAY.edit(torch.zeros(1, 8, 8), range(3), everything, steps=1)
    assert np.array_equal(edited, GRAY.sample(range(3)))


def test_a_stroke_with_little_noise_stays_and_with_much_noise_does_not() -> None:
    painting = EXTREMES[:1]
    error = {
        sigma: np.abs(RGB.edit(painting, [0], Stroke(sigma), steps=1) - (painting / 127.5 - 1)).mean()
        for sigma in (RGB.schedule.lowest, 1.0, 20.0)
    }
    assert error[RGB.schedule.lowest] < 0.05 < error[1.0] < error[20.0]


@pytest.mark.parametrize("sigma", [None, 2.0])
def test_levels_fall_to_the_lowest(sigma: float | None) -> None:
    schedule = GRAY.schedule
    times = np.array(editing.times(schedule, 40, sigma))
    assert len(times) == 40 and (np.diff(times) < 0).all()
    levels = schedule.sigma(times)
    assert levels[0] == pytest.approx(schedule.highest if sigma is None else sigma)
    assert levels[-1] == pytest.approx(schedule.lowest)
    assert editing.times(schedule, 1, sigma) == [times[0]]


def test_interpolation_ends_at_the_samples_of_both_seeds() -> None:
    options = editing_options(steps=2)
    images = GRAY.interpolate((3, 17), 5, options=options)
    ends = GRAY.sample([3, 17], steps=2, batch=5)
    assert np.array_equal(images[[0, -1]], ends)
    assert np.array_equal(GRAY.interpolate((17, 3), 5, options=options)[2], images[2])
    steps = np.abs(np.diff(images, axis=0)).mean((1, 2, 3))
    assert steps.max() < 2 * np.abs(ends[0] - ends[1]).mean() and steps.min() > 0


def editing_options(steps: int) -> Any:
    from udddm.diffusion.samplers import SamplingOptions

    return SamplingOptions(steps=steps, batch=5)


def test_interpolated_noise_is_as_large_as_noise() -> None:
    a, b = torch.randn(2, 6, 3, 32, 32)
    between = editing.slerp(a, b, torch.linspace(0, 1, 6))
    assert torch.equal(between[0], a[0]) and torch.equal(between[-1], b[-1])
    assert (between.std((1, 2, 3)) - 1).abs().max() < 0.05
    assert torch.equal(editing.slerp(a, a, torch.full((6,), 0.3)), a)
    assert torch.equal(editing.slerp(0 * a, 0 * a, torch.full((6,), 0.3)), 0 * a)


def test_classes_are_those_of_the_labels() -> None:
    model = random_model("network.classes=10")
    images = torch.zeros(1, 8, 8)
    kind = Inpaint(MASK)
    same = [model.edit(images, [0], kind, steps=2, batch=1, labels=[label]) for label in (0, 4)]
    assert np.array_equal(model.edit(images, [0], kind, steps=2, batch=1), same[0])
    assert not np.array_equal(*same)
    assert np.array_equal(model.interpolate((3, 8), 2)[1], model.sample([3, 8], labels=[3, 3])[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GRAY.edit(EXTREMES[:1, :1], [0], Inpaint(MASK[1:])), r"mask: give bool \[8, 8\].*7x8"),
        (lambda: GRAY.edit(EXTREMES[:1, :1], [0], Inpaint(MASK & False)), "marks no pixel"),
        (lambda: GRAY.edit(EXTREMES[:1, :1], [0], Upscale(4)), r"images: give 1 images \[N, 1, 2, 2\], not \[1, 1, 8"),
        (lambda: GRAY.edit(EXTREMES[:1, :1], [0], Upscale(3)), "factor 3.*give one of 2, 4, 8"),
        (lambda: GRAY.edit(EXTREMES[:1, :1], [0], Colorize()), "colorize needs a model of RGB images.* 1 channel"),
        (lambda: RGB.edit(EXTREMES[:1], [0], Stroke(1e9)), "sigma 1e.09: the noise levels of this model are"),
        (lambda: RGB.edit(EXTREMES[:2], [0, 1, 2], Stroke()), r"give 1 or 3 images \[N, 3, 8, 8\], not \[2, 3"),
        (lambda: RGB.edit(torch.full((3, 8, 8), 4.0), [0], Stroke()), r"values in \[4, 4\]: scale float images"),
        (lambda: GRAY.interpolate([1, 2, 3], 4), "between: give two seeds"),
        (lambda: GRAY.interpolate((1, 2), 1), "count 1: interpolation needs at least 2"),
    ],
)
def test_what_does_not_fit_the_model_is_one_error(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
