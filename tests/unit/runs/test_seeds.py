"""Seeds that are none, too many or too large."""

import argparse

import pytest
import torch

from udddm.cli.command import integers
from udddm.config import resolve
from udddm.diffusion import schedule
from udddm.errors import ConfigError
from udddm.runs.model import Model


def model() -> Model:
    config = resolve({"train": {"steps": 1}})
    return Model(torch.nn.Linear(1, 1), schedule.build(config.schedule), config, (1, 8, 8))


@pytest.mark.parametrize(
    ("seeds", "message"), [([], "there are none"), ([1 << 63], "too large"), ([0, -(1 << 63) - 1], "too large")]
)
def test_seeds_that_cannot_be_are_refused(seeds: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"seeds: .*{message}"):
        model().sample(seeds)


@pytest.mark.parametrize(
    ("text", "message"), [("9223372036854775808", "below 2"), ("0-9999999999", "more than"), ("0-9999999,1-3", "more")]
)
def test_lists_of_numbers_on_the_command_line_have_limits(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        integers(text)
    assert integers("0-3,9") == [0, 1, 2, 3, 9]
