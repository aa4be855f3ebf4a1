"""Small models without training, for tests of what reads or writes models."""

from __future__ import annotations

from pathlib import Path

import torch

from udddm import networks
from udddm.config import load_config
from udddm.diffusion import schedule
from udddm.runs.model import Model
from udddm.runs.release import write_weights


def random_model(*settings: str, shape: tuple[int, int, int] = (1, 8, 8), scale: float = 0.3) -> Model:
    """A model for images [C, H, W] of the preset `digits` with `settings`, in evaluation mode.

    All its weights are normal with the standard deviation `scale`, unlike initial weights, of which some are 0: its
    images depend on every input.
    """
    config = load_config("digits", list(settings))
    network = networks.for_run(config, shape).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return Model(network, schedule.build(config.schedule), config, shape)


def saved(model: Model, folder: Path, average: str = "0.9") -> Path:
    """Write a release of a model to the new directory `folder`, which is returned."""
    folder.mkdir()
    write_weights(model, average, folder)
    return folder
