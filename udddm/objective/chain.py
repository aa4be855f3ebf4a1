"""The chain objective: consistency training whose teacher is the x0-state store (docs/method.md).

A chain keeps one noise for L visits and climbs one noise level at each. The target of level k is f at level k - 1 on
the same noise path: the state stored one visit ago, or, at the first visit of a chain, one extra evaluation without
gradient (consistency training, Song et al. 2023, does that at every step: L = 1). The target of the lowest level is
x_0. Levels are cyclic: after level M a chain goes on at level 0, whose target needs no state, so that every level is
visited equally often whatever L is. L = M + 1 begun at level 0 is the trajectory objective.

With clock u = epochs since the stage began + offset(sample), a chain is the visits with equal u // L. The offset
staggers the chains; the first chain of a stage is the shorter for it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm import noise
from udddm.config import ChainConfig
from udddm.noise import Stream
from udddm.objective.loss import Visits, adaptive_loss, add_noise, denoise
from udddm.process import SIGMA_HIGHEST, Coefficients, Process

Ids = npt.NDArray[np.int64]


class Chain:
    """The objective for a run of `epochs` epochs (stages are fractions of it).

    `conditioned` says whether the network takes an image. That image is fresh noise, as in the first step of
    Algorithm 2: were it the state, the network would copy its target. With `lockstep` the network is called twice in
    every step, needed or not: where calls exchange weights between ranks (ZeRO 3), all must make the same ones.
    """

    def __init__(
        self,
        process: Process,
        config: ChainConfig,
        huber_c: float,
        seed: int,
        epochs: float,
        conditioned: bool,
        lockstep: bool = False,
    ):
        self.process, self.config, self.huber_c = process, config, huber_c
        self.seed, self.conditioned, self.lockstep = seed, conditioned, lockstep
        self._starts = [math.ceil(stage.start * epochs) for stage in config.stages]
        self._times = [process.levels(stage.levels) for stage in config.stages]

    def position(self, ids: npt.NDArray[np.int64], epoch: int) -> tuple[int, Ids, Ids, Ids]:
        """(stage, chain number, visit within the chain, level) of samples `ids` in `epoch`."""
        stage = max(j for j, start in enumerate(self._starts) if start <= epoch)
        levels = self.config.stages[stage].levels
        length = levels + 1 if self.config.length == "trajectory" else self.config.length
        offset = noise.below(length, noise.keys(self.seed, Stream.CHAIN_OFFSET, ids, stage))
        since = epoch - self._starts[stage]
        chain, visit = np.divmod(since + offset, length)
        visit = np.where(chain == 0, since, visit).astype(np.int64)
        if self.config.length == "trajectory":
            first = np.zeros_like(ids)
        else:
            first = noise.below(levels + 1, noise.keys(self.seed, Stream.CHAIN_LEVEL, ids, stage, chain))
        return stage, chain, visit, (first + visit) % (levels + 1)

    def plan(self, ids: npt.NDArray[np.int64], epoch: int) -> Visits:
        stage, chain, visit, level = self.position(ids, epoch)
        times = self._times[stage]
        lowest = level == 0
        if self.config.guiding == "visits":
            guide = 1 / (level + 1.0)
        else:
            guide = lowest.astype(np.float64)
        weight = np.ones(len(ids))
        if self.config.weighting == "gap":
            sigma = np.minimum(self.process.sigma(times), SIGMA_HIGHEST)
            weight = 1 / np.diff(sigma, prepend=0.0)[level]
        fresh = np.flatnonzero((visit == 0) & ~lowest)
        return Visits(
            coefficients=torch.from_numpy(self.process.coefficients(times[level])),
            noise_key=noise.as_tensor(noise.keys(self.seed, Stream.NOISE, ids, stage, chain)),
            condition_key=noise.as_tensor(noise.keys(self.seed, Stream.CONDITION, ids, epoch)),
            guide=torch.from_numpy(guide.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            fresh=torch.from_numpy(fresh),
            fresh_coefficients=torch.from_numpy(self.process.coefficients(times[level[fresh] - 1])),
        )

    def __call__(
        self,
        network: nn.Module,
        x0: torch.Tensor,
        state: torch.Tensor,
        visits: Visits,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = tuple(x0.shape[1:])
        eps = noise.normal(visits.noise_key, shape)
        condition = noise.normal(visits.condition_key, shape) if self.conditioned else None
        target = state
        if len(visits.fresh):
            rows = visits.fresh
            below = Coefficients(*visits.fresh_coefficients)
            with torch.no_grad():
                first = denoise(
                    network,
                    add_noise(x0[rows], eps[rows], below),
                    below,
                    None if condition is None else condition[rows],
                    None if labels is None else labels[rows],
                )
            target = state.index_copy(0, rows, first)
        elif self.lockstep:
            at = Coefficients(*visits.coefficients[:, :1])
            with torch.no_grad():
                denoise(
                    network,
                    x0[:1],
                    at,
                    None if condition is None else condition[:1],
                    None if labels is None else labels[:1],
                )
        at = Coefficients(*visits.coefficients)
        output = denoise(network, add_noise(x0, eps, at), at, condition, labels)
        return visits.weight * adaptive_loss(output, x0, target, visits.guide, self.huber_c), output.detach()
