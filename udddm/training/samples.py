"""Images drawn during training, with the first EMA."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from udddm import image_grid, networks
from udddm.backends.engines import Engine
from udddm.config import RunConfig
from udddm.data import ImageDataset
from udddm.diffusion.samplers import SamplingOptions
from udddm.diffusion.schedule import NoiseSchedule
from udddm.ema import Average
from udddm.runs.conditions import examples, sample_conditions
from udddm.runs.model import Model
from udddm.runs.run import BESIDE


class Drawing:
    """Draws images with the weights of a run as they are. Ranks share the work, and every rank must call `draw`."""

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        schedule: NoiseSchedule,
        engine: Engine,
        emas: Sequence[Average],
    ):
        self._config, self._dataset, self._shape = config, dataset, dataset.shape
        self._schedule, self._engine, self._emas = schedule, engine, emas

    def draw(
        self,
        count: int,
        stop_signal: Callable[[], int] | None = None,
        keep: Callable[[Mapping[str, torch.Tensor]], None] | None = None,
    ) -> torch.Tensor:
        """Draw `count` images, with the first EMA, or with the weights if there is none.

        Returns them on rank zero as [count, C, H, W] in [-1, 1] on the host, and an empty tensor on other ranks. There
        are fewer if `stop_signal` returns a signal before all are drawn. `keep` receives the weights. A run with
        `data.condition` uses the conditioning images of the first samples of its data set.
        """
        engine, ranks = self._engine, self._engine.ranks
        network = networks.for_run(self._config, self._shape)
        pieces = self._emas[0].weights if self._emas else engine.weights()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(engine.whole(pieces, name))  # type: ignore[arg-type]
        if keep is not None:
            keep(dict(network.named_parameters()))
        network.to(ranks.device).eval()
        model = Model(network, self._schedule, self._config, self._shape)
        seeds = np.array_split(np.arange(count), ranks.world_size)[ranks.rank].tolist()
        chosen = self._config.sample
        options = SamplingOptions(chosen.steps, chosen.sampler, chosen.guidance, settings=chosen.settings)
        drawn = model.batches(seeds, options=options, conditions=sample_conditions(self._config, self._dataset, seeds))
        if stop_signal is not None:
            drawn = itertools.takewhile(lambda _: not stop_signal(), drawn)
        own = torch.cat([torch.empty(0, *self._shape), *drawn]).clamp(-1, 1)
        return torch.cat(ranks.gather_first(own) or [own[:0]])

    def write_conditions(self, directory: Path, count: int) -> None:
        """Write the grids `BESIDE` of `count` drawn images, once, for a run with `data.condition`. Raises OSError."""
        files = [directory / name for name in BESIDE]
        if not self._config.data.condition.used or all(file.exists() for file in files):
            return
        given = examples(self._config, self._dataset, range(count))
        for file, images in zip(files, (given.shown, given.real), strict=True):
            image_grid.save_image_grid(images, file)
