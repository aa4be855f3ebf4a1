"""The one-evaluation generator as a module with tensors in and out, which other programs can hold."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from udddm import rng
from udddm.rng import Stream
from udddm.runs.model import Model


class Generator(nn.Module):
    """Noise to images, with the first evaluation of a sampler: f = c_skip x_T + c_out F(c_in x_T, T), where
    x_T = sigma_T noise (arXiv 2405.21059, Algorithm 2).

    The coefficients are constants in float32. `half` computes F in float16; images stay float32.
    """

    def __init__(self, model: Model, *, half: bool = False):
        super().__init__()
        self.network = model.network.half() if half else model.network
        self.classes = model.config.network.classes
        self.conditioned = model.config.network.conditioned
        at = model.schedule.coefficients(np.array([model.schedule.last]))[:, 0]
        _, self.sigma, self.c_skip, self.c_out, self.c_in, self.c_noise = map(float, at)

    @property
    def inputs(self) -> list[str]:
        """The names of the arguments of `forward` that this model takes, in order."""
        return ["noise", *(["condition"] if self.conditioned else []), *(["label"] if self.classes else [])]

    def forward(self, noise: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Standard normal noise [B, C, H, W], further noise of that shape if the network takes a conditioning image,
        and labels [B] int64 if it has classes -> images [B, C, H, W] in [-1, 1]."""
        given = dict(zip(self.inputs[1:], others, strict=True))
        xt = self.sigma * noise
        level = torch.full((noise.shape[0],), self.c_noise, device=noise.device)
        output = self.network(self.c_in * xt, level, given.get("condition"), given.get("label"))
        images: torch.Tensor = (self.c_skip * xt + self.c_out * output.float()).clamp(-1, 1)
        return images

    def example(self, model: Model, seeds: range) -> dict[str, torch.Tensor]:
        """The inputs from which `model.sample(seeds)` draws its images, by name."""
        host = np.asarray(seeds, np.int64)

        def draw(stream: Stream) -> torch.Tensor:
            return rng.normal(rng.as_tensor(rng.keys(0, stream, host)), model.shape)

        labels = model.default_labels(list(seeds))
        found = {
            "noise": draw(Stream.SAMPLE_NOISE),
            "condition": draw(Stream.SAMPLE_CONDITION),
            "label": torch.tensor(labels or [0] * len(seeds)),
        }
        return {name: found[name] for name in self.inputs}
