"""Editing and conditioning images in `udddm sample`: options, and the images that they give."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from udddm.cli.command import integers, path, positive

if TYPE_CHECKING:
    from udddm.diffusion.editing import Edit
    from udddm.runs.model import Model

EDITS = ("inpaint", "upscale", "colorize", "interpolate", "stroke")
_OPTIONS = {
    "input": ("inpaint", "upscale", "colorize", "stroke"),
    "mask": ("inpaint",),
    "factor": ("upscale",),
    "sigma": ("stroke",),
    "between": ("interpolate",),
}
"""The edits to which each option applies."""
_NEEDED = ("input", "mask", "factor", "between")
_EDIT_STEPS, _BETWEEN = 40, 8


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the options for images that are given (docs/tasks.md)."""
    group = parser.add_argument_group("images that are given (docs/tasks.md)")
    group.add_argument(
        "--edit",
        choices=EDITS,
        help=f"edit an image with a model that was not trained for it; --steps is then {_EDIT_STEPS} by default, and 1 "
        "for interpolate",
    )
    group.add_argument("--input", type=path, metavar="FILE", help="the image to edit, a folder of images, or .npy")
    group.add_argument(
        "--mask", metavar="FILE|X,Y,W,H", help="inpaint: what to generate, the white part of a file or a rectangle"
    )
    group.add_argument("--factor", type=positive, metavar="N", help="upscale: how much larger the result is")
    group.add_argument(
        "--sigma", type=float, metavar="S", help="stroke: noise level that is added to the input (default 2)"
    )
    group.add_argument("--between", type=integers, metavar="A,B", help="interpolate: two seeds")
    group.add_argument(
        "--condition",
        type=path,
        metavar="FILE",
        help="the conditioning image for a model trained with data.condition, a folder of images, or .npy",
    )


def check_tasks(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error for options that are missing, or that would be ignored. Sets the default of `--steps`."""
    edit, error = arguments.edit, parser.error
    for name, edits in _OPTIONS.items():
        given = getattr(arguments, name) is not None
        if given and edit not in edits and not (name == "mask" and arguments.condition is not None):
            error(f"--{name} is for --edit {' or '.join(edits)}")
        if edit in edits and name in _NEEDED and not given:
            error(f"--edit {edit} needs --{name}")
    if edit is not None and arguments.condition is not None:
        error("--condition is for a model trained with data.condition, and --edit for any other: give one of them")
    if arguments.between is not None and len(arguments.between) != 2:
        error("--between takes two seeds, such as 3,17")
    if edit == "interpolate" and arguments.seeds:
        error("--seeds and --edit interpolate: the two seeds are those of --between")
    custom = arguments.sampler != "renoise" or arguments.sampler_settings
    if edit not in (None, "interpolate") and custom:
        error(f"--sampler has no effect with --edit {edit}, which has its own steps")
    if arguments.steps is None:
        arguments.steps = _EDIT_STEPS if edit not in (None, "interpolate") else 1


class Given:
    """The images that are given on the command line. Raises ConfigError, DataError and OSError."""

    def __init__(self, arguments: argparse.Namespace, model: Model):
        self._arguments, self._model = arguments, model
        self.images: Any = None
        self._kind: Edit | None = None
        if arguments.edit not in (None, "interpolate"):
            self._kind = self._edit()
            self._kind.check(model.shape)
            self.images = self._read(arguments.input, self._kind.input_shape(model.shape))
        elif arguments.condition is not None:
            self.images = self._conditions()

    @property
    def used(self) -> bool:
        """Whether the command edits images or conditions on them."""
        return self._arguments.edit is not None or self.images is not None

    def seeds(self, default: int) -> list[int]:
        """The seeds: those of the command line; by default one for each image, or `default`."""
        arguments, count = self._arguments, None if self.images is None else len(self.images)
        if arguments.edit == "interpolate":
            return list(range(arguments.count or _BETWEEN))
        if arguments.seeds:
            return list(arguments.seeds)
        return list(range(arguments.count or count or default))

    def draw(self, seeds: Sequence[int], labels: Sequence[int] | None) -> Any:
        """The images [len(seeds), C, H, W] that the command writes."""
        from udddm.diffusion.samplers import SamplingOptions

        chosen, model = self._arguments, self._model
        common: dict[str, Any] = {"labels": labels, "guidance": chosen.guidance, "batch": chosen.batch}
        if self._kind is not None:
            return model.edit(self.images, seeds, self._kind, steps=chosen.steps, **common)
        if chosen.edit == "interpolate":
            options = SamplingOptions(
                chosen.steps, chosen.sampler, chosen.guidance, chosen.batch, chosen.sampler_settings
            )
            return model.interpolate(tuple(chosen.between), len(seeds), labels=labels, options=options)
        sampler = {"sampler": chosen.sampler, "settings": chosen.sampler_settings}
        return model.sample(seeds, steps=chosen.steps, conditions=self.images, **sampler, **common)

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """The labels that are used if none are given."""
        if self._arguments.edit == "interpolate":
            return self._model.default_labels([self._arguments.between[0]] * len(seeds))
        return self._model.default_labels(seeds)

    def _edit(self) -> Edit:
        from udddm.diffusion import editing
        from udddm.tools.given_images import read_mask

        chosen = self._arguments
        if chosen.edit == "inpaint":
            return editing.Inpaint(read_mask(chosen.mask, self._model.shape))
        if chosen.edit == "upscale":
            return editing.Upscale(chosen.factor)
        if chosen.edit == "stroke":
            return editing.Stroke() if chosen.sigma is None else editing.Stroke(chosen.sigma)
        return editing.Colorize()

    def _conditions(self) -> Any:
        import numpy as np

        from udddm.data.images import scaled
        from udddm.errors import ConfigError
        from udddm.tools.given_images import read_mask

        chosen, model = self._arguments, self._model
        conditions = model.conditions
        if conditions is None:
            raise ConfigError("--condition: this model was trained without data.condition; use --edit, or leave it out")
        images = self._read(chosen.condition, conditions.given_shape)
        hides = model.config.data.condition.kind == "mask"
        if not hides and chosen.mask is not None:
            raise ConfigError(f"--mask has no effect: data.condition.kind is {model.config.data.condition.kind}")
        if hides and chosen.condition.suffix != ".npy":
            if chosen.mask is None:
                raise ConfigError("this model fills in the hidden part of an image: give that part with --mask")
            images = scaled(images, np.arange(len(images)))
        if chosen.mask is not None:
            images = np.where(read_mask(chosen.mask, model.shape).numpy(), np.float32("nan"), images)
        return images

    def _read(self, place: Any, shape: tuple[int, int, int]) -> Any:
        from udddm.tools.given_images import read_images

        return read_images(place, shape)
