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

    The coefficients are constants in float32. `half` computes F in float16; images stay float32. A model with
    `data.condition` takes the conditioning image as a user gives it (`ConditionImages.given_shape`), and for `mask` the
    hidden part as a further image.
    """

    def __init__(self, model: Model, *, half: bool = False):
        super().__init__()
        self.network = model.network.half() if half else model.network
        self.classes = model.config.network.classes
        self.conditioned = model.config.network.conditioned
        self.conditions = model.conditions
        at = model.schedule.coefficients(np.array([model.schedule.last]))[:, 0]
        _, self.sigma, self.c_skip, self.c_out, self.c_in, self.c_noise = map(float, at)

    @property
    def inputs(self) -> list[str]:
        """The names of the arguments of `forward` that this model takes, in order."""
        hides = self.conditions is not None and self.conditions.hides
        optional = {"condition": self.conditioned, "mask": hides, "label": bool(self.classes)}
        return ["noise", *(name for name, taken in optional.items() if taken)]

    def forward(self, noise: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Standard normal noise [B, C, H, W], then what `inputs` lists -> images [B, C, H, W] in [-1, 1].

        `condition` is the conditioning image of the data [B, *given_shape] in [-1, 1], or, for a network that was
        trained on noise there, further noise [B, C, H, W]. `mask` [B, 1, H, W] is above 0.5 in hidden pixels. `label`
        is [B] int64.
        """
        given = dict(zip(self.inputs[1:], others, strict=True))
        xt = self.sigma * noise
        level = torch.full((noise.shape[0],), self.c_noise, device=noise.device)
        output = self.network(self.c_in * xt, level, self._condition(given), given.get("label"))
        images: torch.Tensor = (self.c_skip * xt + self.c_out * output.float()).clamp(-1, 1)
        return images

    def _condition(self, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
        condition = given.get("condition")
        if self.conditions is None or condition is None:
            return condition
        if self.conditions.hides:
            return self.conditions.masked(condition, given["mask"] > 0.5)
        return self.conditions.prepared(condition)

    def expected(self, model: Model, seeds: range) -> torch.Tensor:
        """The images of `model.sample` that `forward` computes from the inputs `example(model, seeds)`."""
        inputs = self.example(model, seeds)
        given = inputs["condition"] if self.conditions is not None else None
        if given is not None and "mask" in inputs:
            given = torch.where(inputs["mask"] > 0.5, torch.nan, given)
        return torch.from_numpy(model.sample(seeds, conditions=given))

    def example(self, model: Model, seeds: range) -> dict[str, torch.Tensor]:
        """The inputs from which `model.sample(seeds)` draws its images, by name.

        Conditioning images of the data are clamped noise here, and a quarter of each is hidden.
        """
        host = np.asarray(seeds, np.int64)

        def draw(stream: Stream, shape: tuple[int, int, int]) -> torch.Tensor:
            return rng.normal(rng.as_tensor(rng.keys(0, stream, host)), shape)

        labels = model.default_labels(list(seeds))
        if self.conditions is None:
            condition = draw(Stream.SAMPLE_CONDITION, model.shape)
        else:
            condition = draw(Stream.SAMPLE_CONDITION, self.conditions.given_shape).clamp(-1, 1)
        _, height, width = model.shape
        mask = torch.zeros(len(seeds), 1, height, width)
        mask[:, :, height // 4 : height // 4 + -(-height // 2), width // 4 : width // 4 + -(-width // 2)] = 1
        found = {
            "noise": draw(Stream.SAMPLE_NOISE, model.shape),
            "condition": condition,
            "mask": mask,
            "label": torch.tensor(labels or [0] * len(seeds)),
        }
        return {name: found[name] for name in self.inputs}
