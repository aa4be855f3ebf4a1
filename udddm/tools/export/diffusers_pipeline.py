"""A diffusers pipeline of a udddm model. This module imports diffusers, so only code that needs it imports this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config

from udddm import networks
from udddm.config import resolve
from udddm.config.trust import MODEL, check_trusted
from udddm.diffusion import schedule
from udddm.errors import ConfigError
from udddm.runs.model import Model
from udddm.tools.export.given import GivenImages, given_conditions


class GeneratorModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The network of a udddm model as a component of a pipeline.

    `config` is the configuration of the training run, as JSON, and `shape` the shape [C, H, W] of an image. Raises
    ConfigError if the configuration is invalid or names code to import.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, run: Mapping[str, Any], shape: Sequence[int]):
        super().__init__()
        found = resolve(_plain(run), "generator/config.json")
        check_trusted(found, MODEL, "generator/config.json")
        channels, height, width = shape
        self.run, self.shape = found, (channels, height, width)
        self.network = networks.for_run(found, self.shape)

    def forward(
        self,
        noisy: torch.Tensor,
        c_noise: torch.Tensor,
        condition: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `udddm.networks.Network`."""
        output: torch.Tensor = self.network(noisy, c_noise, condition, labels)
        return output

    def model(self) -> Model:
        """The same network as a udddm model."""
        return Model(self.network.eval(), schedule.build(self.run.schedule), self.run, self.shape)


def _plain(value: Any) -> Any:
    """Mappings and sequences of diffusers' configuration as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class UdddmPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Generates images with one network evaluation each, or with several.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipe(seeds=range(16)).images
    """

    def __init__(self, generator: GeneratorModel):
        super().__init__()
        self.register_modules(generator=generator)

    def __call__(
        self,
        batch_size: int | None = None,
        *,
        class_labels: Sequence[int] | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **images: Unpack[GivenImages],
    ) -> Any:
        """Generate images.

        Args:
            batch_size: number of images. None: that of `image`, or 1. With `seeds`, their number counts.
            class_labels: one class per image. None: seed modulo number of classes, for a model with classes.
            num_inference_steps: network evaluations per image.
            guidance_scale: weight of classifier-free guidance; 1 disables it.
            seeds: one per image: `seeds=range(64)` gives the images of `udddm sample --count 64`.
            generator: draws the seeds if there are none. None: torch's default generator.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [-1, 1]).
            return_dict: whether to return an ImagePipelineOutput instead of a tuple.
            image: of a model with `data.condition`, the conditioning image of each generated image, or one for all: PIL
                images, or an array or tensor [N, C, H, W], uint8 or in [-1, 1]. For `downscale`, the small image.
            mask_image: of a model with `data.condition.kind=mask`, the part that is generated: white in PIL images, or
                1 in an array or tensor [N, 1, H, W].

        Raises ConfigError for wrong arguments, as `udddm.Model.sample`, and for images that have no form in PIL.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"output_type={output_type!r}: give pil, np or pt")
        model = self.generator.model()
        given = given_conditions(images, model.conditions)
        count = batch_size or (1 if given is None else len(given))
        chosen = _seeds(count, generator) if seeds is None else seeds
        drawn = model.sample(
            chosen, steps=num_inference_steps, labels=class_labels, guidance=guidance_scale, conditions=given
        )
        converted = _converted(drawn, output_type)
        return ImagePipelineOutput(images=converted) if return_dict else (converted,)


def _seeds(count: int, generator: torch.Generator | None) -> list[int]:
    device = generator.device if generator is not None else torch.device("cpu")
    drawn: list[int] = torch.randint(0, 1 << 62, (count,), generator=generator, device=device).tolist()
    return drawn


def _converted(images: np.ndarray[Any, np.dtype[np.float32]], output_type: str) -> Any:
    """Images [B, C, H, W] in [-1, 1] in the form of `output_type`."""
    if output_type == "pt":
        return torch.from_numpy(images)
    unit = images.transpose(0, 2, 3, 1) / 2 + 0.5
    if output_type == "np":
        return unit
    if unit.shape[3] not in (1, 3):
        raise ConfigError(f"output_type='pil': images have {unit.shape[3]} channels, not 1 or 3; give np or pt")
    return DiffusionPipeline.numpy_to_pil(unit)
