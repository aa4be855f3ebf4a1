"""Load a trained model from a run, a checkpoint or a release, and generate images with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm import networks
from udddm.backends.distributed.ranks import choose_device
from udddm.config import RunConfig
from udddm.config.plugins import NETWORKS, name_of
from udddm.config.trust import MODEL, check_trusted
from udddm.data.images import scaled as scaled_images
from udddm.diffusion import editing, samplers, schedule
from udddm.diffusion.conditions import ConditionImages
from udddm.diffusion.editing import Edit
from udddm.diffusion.samplers import SamplingOptions, SamplingTask
from udddm.diffusion.schedule import NoiseSchedule
from udddm.errors import CheckpointError, ConfigError, DataError
from udddm.rng import Stream
from udddm.runs import posthoc_ema
from udddm.runs.checkpoint import NAME, load_config
from udddm.runs.hub import on_hub
from udddm.runs.pretrained import read_checkpoint
from udddm.runs.remote import open_copy
from udddm.runs.run import Run
from udddm.runs.weights import Saved
from udddm.storage import local_path


class SampleOptions(TypedDict, total=False):
    """The arguments of `Model.sample` apart from the seeds."""

    steps: int
    sampler: str | Callable[..., Any]
    settings: Mapping[str, Any] | None
    labels: Sequence[int] | None
    guidance: float
    batch: int | None
    conditions: Any


@dataclass(frozen=True)
class Model:
    """A trained network in evaluation mode, with the settings that sampling needs."""

    network: nn.Module
    schedule: NoiseSchedule
    config: RunConfig
    """The configuration of the training run."""
    shape: tuple[int, int, int]
    """(C, H, W) of its images."""

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def sample(
        self,
        seeds: Sequence[int],
        *,
        steps: int = 1,
        sampler: str | Callable[..., torch.Tensor] = "renoise",
        settings: Mapping[str, Any] | None = None,
        labels: Sequence[int] | None = None,
        guidance: float = 1.0,
        batch: int | None = None,
        conditions: Any = None,
    ) -> npt.NDArray[np.float32]:
        """Generate images [len(seeds), C, H, W], float32 in [-1, 1], with `steps` network evaluations each.

        Each image depends only on its seed (and label). Without `labels`, a model with classes uses `seed % classes`.
        `sampler` is a name or a custom function, and `settings` are its settings (docs/extending.md). A `guidance`
        other than 1 weighs the labels (docs/method.md) and takes two network calls per evaluation.

        A model with `data.condition` needs `conditions`, an array or tensor of one image for each seed, or one for all:
        uint8, or floats in [-1, 1]. Its shape [N, C, H, W] is that of `ConditionImages.given_shape`: the small image
        for `downscale`, one channel for `gray`, the image with NaN in hidden pixels for `mask`, and the conditioning
        image itself for `pairs` (docs/tasks.md).

        By default, the network is called with as many images as there are, up to 250. The rounding of its sums depends
        on that number, so that an image changes by about 1e-6 with the number of `seeds`. Given `batch`, every call
        has exactly this many images, the last one padded, and an image is the same to the last bit, whatever else is
        drawn.

        Raises ConfigError if seeds or labels are not a sequence of integers, if the number of labels differs from that
        of the seeds or the model lacks one of their classes, if the sampler is unknown, if the model was not trained
        for guidance, and if `conditions` are missing, not used by the model, or of another shape or range.
        """
        if not len(_integers(seeds, "seeds")):
            raise ConfigError("seeds: there are none; give one for each image, such as range(64)")
        options = SamplingOptions(steps, name_of(sampler, "sampler"), guidance, batch, settings or {})
        rows = None
        if conditions is not None and self.conditions is not None:
            shape = self.conditions.given_shape
            hides = self.config.data.condition.kind == "mask"
            prepared = self.conditions.prepared(_images(conditions, shape, len(seeds), "conditions", holes=hides))
            rows = prepared.__getitem__
        elif conditions is not None:
            raise ConfigError(
                "conditions: this model was trained without data.condition; leave them out, or edit an image "
                "(Model.edit, udddm sample --edit)"
            )
        return _joined(self.batches(seeds, labels, options, rows), self.shape)

    def batches(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        options: SamplingOptions | None = None,
        conditions: Callable[[list[int]], torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Same as `sample`, but yields batches: tensors [<= options.batch, C, H, W] on the host, not clamped.

        `conditions` returns the conditioning images [B, C, H, W] of the seeds at B positions, as the network takes
        them.
        """
        chosen = options or SamplingOptions()
        if conditions is None and self.config.data.condition.used:
            raise ConfigError(
                f"this model is conditioned on images (data.condition.kind={self.config.data.condition.kind}): give "
                "one for each seed with conditions=, or udddm sample --condition"
            )
        if conditions is None:
            return self._drawn(seeds, labels, chosen)
        if chosen.sampler == "algorithm-2" and chosen.steps > 1:
            raise ConfigError(
                "sampler algorithm-2 conditions the network on its estimate, and this model on images: use renoise"
            )
        return self._drawn(
            seeds,
            labels,
            chosen,
            lambda task, rows: samplers.run_sampler(samplers.with_conditions(task, conditions(rows)), chosen),
        )

    def edit(
        self,
        images: Any,
        seeds: Sequence[int],
        kind: Edit,
        *,
        steps: int = editing.STEPS,
        labels: Sequence[int] | None = None,
        guidance: float = 1.0,
        batch: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Edit images without training for it (Song et al. 2023, Algorithm 4): [len(seeds), C, H, W] in [-1, 1].

        `kind` is `Inpaint(mask)`, `Upscale(factor)`, `Colorize()` or `Stroke(sigma)` of `udddm.diffusion.editing`.
        `images` is an array or tensor, uint8 or floats in [-1, 1], of one image for each seed or one for all:
        [N, C, H, W], with the smaller shape that `kind.input_shape` states for upscaling and coloring. `steps` is the
        number of network evaluations. The other arguments, and how the result depends on them, are those of `sample`.

        Raises the errors of `sample`, and ConfigError if `kind` does not apply to this model or `images` have another
        shape.
        """
        if self.config.data.condition.used:
            raise ConfigError("edit: this model is conditioned on images; generate with conditions= instead")
        kind.check(self.shape)
        low, high = self.schedule.lowest, self.schedule.highest
        if kind.sigma is not None and not low <= kind.sigma <= high:
            raise ConfigError(f"sigma {kind.sigma:g}: the noise levels of this model are {low:g} to {high:g}")
        given = _images(images, kind.input_shape(self.shape), len(_integers(seeds, "seeds")), "images")

        def run(task: SamplingTask, rows: list[int]) -> torch.Tensor:
            return editing.edit(task, given[rows].to(task.device), kind)

        return _joined(self._drawn(seeds, labels, SamplingOptions(steps, "renoise", guidance, batch), run), self.shape)

    def interpolate(
        self,
        between: tuple[int, int],
        count: int,
        *,
        labels: Sequence[int] | None = None,
        options: SamplingOptions | None = None,
    ) -> npt.NDArray[np.float32]:
        """Images [count, C, H, W] on the way from that of one seed to that of another, both included.

        All noise is interpolated spherically. Every image has the class of the first seed unless there are `labels`,
        one for each image. Raises the errors of `sample`, and ConfigError for a count below 2 or another
        number of seeds than two.
        """
        ends = _integers(between, "between")
        if len(ends) != 2:
            raise ConfigError(f"between: give two seeds, such as (3, 17), not {len(ends)}")
        if count < 2:
            raise ConfigError(f"count {count}: interpolation needs at least 2 images")
        first, second = ends
        chosen = options or SamplingOptions(batch=None)
        if self.config.data.condition.used:
            raise ConfigError("interpolate: this model is conditioned on images; generate with conditions= instead")
        fractions = torch.linspace(0, 1, count, dtype=torch.float64)

        def run(task: SamplingTask, rows: list[int]) -> torch.Tensor:
            seeds = torch.full((len(rows),), second, device=task.device)
            draw = samplers.task_of(self.network, self.schedule, self.shape, seeds, None, SamplingOptions()).draw

            def between(stream: Stream, *parts: int) -> torch.Tensor:
                return editing.slerp(task.draw(stream, *parts), draw(stream, *parts), fractions[rows])

            return samplers.run_sampler(replace(task, draw=between), chosen)

        return _joined(self._drawn([first] * count, labels, chosen, run), self.shape)

    def _drawn(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        options: SamplingOptions,
        run: samplers.Draw | None = None,
    ) -> Iterator[torch.Tensor]:
        """The batches of `run`, or of the sampler, after checking the arguments of `sample`."""
        wanted = _integers(seeds, "seeds")
        _check(options)
        self.config.check_guidance(options.guidance, "guidance")
        given = self.default_labels(wanted) if labels is None else self._checked(labels, len(wanted))
        return samplers.batches(self.network, self.schedule, self.shape, wanted, given, options, self.device, run)

    @property
    def conditions(self) -> ConditionImages | None:
        """What prepares the conditioning images of a model with `data.condition`. None for any other model."""
        section = self.config.data.condition
        return ConditionImages(section, self.shape, self.config.seed) if section.used else None

    def default_labels(self, seeds: Sequence[int]) -> list[int] | None:
        """The default class of each seed, `seed % classes`. None for a model without classes."""
        classes = self.config.network.classes
        return [seed % classes for seed in seeds] if classes else None

    def _checked(self, labels: Sequence[int], count: int) -> list[int]:
        classes, given = self.config.network.classes, _integers(labels, "labels")
        if not classes:
            raise ConfigError("labels: this model has no classes (network.classes is 0); leave them out")
        if len(given) != count:
            raise ConfigError(f"labels: {len(given)} labels for {count} seeds; give one label per seed")
        if given and not 0 <= min(given) <= max(given) < classes:
            wrong = next(label for label in given if not 0 <= label < classes)
            raise ConfigError(f"labels: there is no class {wrong}; the model has {classes} classes, numbered from 0")
        return given


def _joined(drawn: Iterator[torch.Tensor], shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    images: npt.NDArray[np.float32] = torch.cat([torch.empty(0, *shape), *drawn]).clamp(-1, 1).numpy()
    return images


def _images(values: Any, shape: tuple[int, int, int], count: int, what: str, *, holes: bool = False) -> torch.Tensor:
    """Images [count, *shape], float32 in [-1, 1], from those of a user, one for all or one for each.

    With `holes`, NaN is kept. Raises ConfigError, which names `what`.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[1:] != shape or len(array) not in (1, count):
        number = "1" if count == 1 else f"1 or {count}"
        raise ConfigError(f"{what}: give {number} images [N, {', '.join(map(str, shape))}], not {list(array.shape)}")
    hidden = np.isnan(array) if holes and array.dtype.kind == "f" else np.zeros(array.shape, bool)
    try:
        scaled = scaled_images(np.where(hidden, 0, array).astype(array.dtype), np.arange(len(array)))
    except DataError as error:
        raise ConfigError(f"{what}: {error}") from None
    scaled[hidden] = np.nan
    return torch.from_numpy(scaled).expand(count, -1, -1, -1)


def _check(options: SamplingOptions) -> None:
    """Raise ConfigError for options of a wrong type or out of range."""
    steps, batch, guidance, settings = options.steps, options.batch, options.guidance, options.settings
    for name, value in (("steps", steps), ("batch", 1 if batch is None else batch)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ConfigError(f"{name}={value!r}: give a whole number")
    if steps < 1 or (batch is not None and batch < 1):
        raise ConfigError(f"steps ({steps}) and batch ({batch}) must be at least 1")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float, np.number)):
        raise ConfigError(f"guidance={guidance!r}: give a number")
    if not isinstance(settings, Mapping):
        raise ConfigError(f"settings={settings!r}: give a mapping such as {{'levels': [5, 1]}}")
    samplers.check_evaluations(options.sampler, steps, "steps")


def _integers(values: Any, what: str) -> list[int]:
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, (Sequence, range)) or isinstance(values, (str, bytes)):
        raise ConfigError(f"{what}: give a sequence of integers, such as range(64), not {values!r}")
    wrong = next((each for each in values if isinstance(each, bool) or not isinstance(each, (int, np.integer))), None)
    if wrong is not None:
        raise ConfigError(f"{what}: {wrong!r} is not an integer")
    found = [int(each) for each in values]
    if found and not -(1 << 63) <= min(found) <= max(found) < 1 << 63:
        raise ConfigError(f"{what}: {max(found, key=abs)} is too large; give integers below 2^63")
    return found


def load_model(
    checkpoint: str | Path,
    *,
    ema: float | str | None = None,
    ema_length: float | None = None,
    device: str | torch.device = "auto",
    trust: bool = False,
) -> Model:
    """Load the model of a run, checkpoint or release from a directory or URL, or of a release on the Hugging Face Hub
    (`hf://user/model`, or `hf://user/model@revision`).

    `ema` selects the EMA of the weights: a decay that the run kept, "power-<length>", "none" for the raw weights, None
    for the first EMA. `ema_length` computes the EMA of this relative length from the snapshots of a run (not of a
    single checkpoint). `device` is auto, cpu, cuda (the first GPU), or a device object.
    A checkpoint may name a custom network or noise schedule as package.module:factory. Importing it runs its code, so
    this requires `trust`; set it only for files that you trust.

    Raises ConfigError if the checkpoint names custom code and `trust` is not set, and CheckpointError if the checkpoint
    is damaged, belongs to a different network, or lacks that EMA.
    """
    if ema is not None and ema_length is not None:
        raise ConfigError("ema selects an EMA that the run kept, ema_length computes a new one: give only one of them")
    if not isinstance(checkpoint, (str, Path)):
        raise ConfigError(f"checkpoint={checkpoint!r}: give the path or URL of a run, a checkpoint or a release")
    if ema_length is not None and (isinstance(ema_length, bool) or not isinstance(ema_length, (int, float))):
        raise ConfigError(f"ema_length={ema_length!r}: give a number such as 0.07")

    def load(path: Path) -> Model:
        config, shape = load_config(path)
        if not trust:
            check_trusted(config, MODEL, str(checkpoint))
        custom = NETWORKS.is_import(config.network.name)
        network = networks.for_run(config, shape) if custom else networks.outline(config.network, shape)
        shapes = {name: p.shape for name, p in network.named_parameters()}
        weights: Mapping[str, torch.Tensor]
        if ema_length is not None:
            weights = posthoc_ema.average(_run_of(checkpoint), ema_length, shapes)
        else:
            weights = kept = Saved.average(path, config.train.averages, ema)
            kept.check_network(shapes)
        if not custom:  # now that the weights are known to have its size, which somebody else chose
            network = networks.for_run(config, shape)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name])
                if not parameter.isfinite().all():
                    raise CheckpointError(
                        f"{checkpoint}: the weights of {name} are not all finite; use another checkpoint"
                    )
        network.to(device if isinstance(device, torch.device) else choose_device(device)).eval()
        return Model(network, schedule.build(config.schedule), config, shape)

    return read_checkpoint(checkpoint, load, ("config",) if ema_length is not None else ("config", "model", "ema"))


def _run_of(where: str | Path) -> Run:
    """Open a run to compute an EMA of a chosen length from its snapshots. Raises ConfigError for a checkpoint."""
    local = local_path(where)
    name = local.resolve().name if local is not None else str(where).rstrip("/").rpartition("/")[2]
    if on_hub(where) or NAME.fullmatch(name) or (local is not None and (local / "config.json").exists()):
        raise CheckpointError(
            f"{where} is a single checkpoint, but ema_length needs all the snapshots of a run; give the run"
        )
    return open_copy(where)
