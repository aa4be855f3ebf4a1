"""Algorithm 1 of the paper, as printed: a new time and new noise at every visit, conditioned on the stored state.

It is here to be measured and compared with. It learns to copy its condition (docs/method.md); use `chain`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm import rng
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Coefficients, NoiseSchedule
from udddm.objectives.base import Visits
from udddm.objectives.loss import adaptive_loss
from udddm.rng import Stream


class UDDM:
    def __init__(self, process: NoiseSchedule, huber_c: float, seed: int):
        self.process, self.huber_c, self.seed = process, huber_c, seed

    def plan(self, ids: npt.NDArray[np.int64], epoch: int) -> Visits:
        """t ~ U{1..T} and eps ~ N(0, I) for every visit; n = epoch."""
        t = 1 + rng.randint(self.process.config.timesteps, rng.keys(self.seed, Stream.TIME, ids, epoch))
        return Visits(
            coefficients=torch.from_numpy(self.process.coefficients(t.astype(np.float64))),
            noise_key=rng.as_tensor(rng.keys(self.seed, Stream.NOISE, ids, epoch)),
            condition_key=torch.empty(0, dtype=torch.int64),
            x0_weight=torch.full((len(ids),), 1 / (epoch + 1)),
            weight=torch.ones(len(ids)),
            huber_c=torch.full((len(ids),), self.huber_c),
            teacher_rows=torch.empty(0, dtype=torch.int64),
            teacher_coefficients=torch.empty(6, 0),
        )

    def evaluated(self, visits: Visits) -> int:
        return 0

    def __call__(
        self,
        network: nn.Module,
        x0: torch.Tensor,
        state: torch.Tensor,
        visits: Visits,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = Coefficients(*visits.coefficients)
        xt = add_noise(x0, rng.normal(visits.noise_key, tuple(x0.shape[1:])), at)
        output = denoise(network, xt, at, state, labels)
        return adaptive_loss(output, x0, state, visits.x0_weight, visits.huber_c), output.detach()
