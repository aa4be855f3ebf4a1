"""`udddm data encode` and `decode`: latents of an autoencoder, scaled to [-1, 1], as a data set to train on.

Images are passed to the autoencoder in [-1, 1]. The mean and the standard deviation of each channel are measured over
evenly spaced images before anything is stored. Each channel is stored as (z - mean) / (8 std), clamped to [-1, 1]:
training data lie in that range, and at 8 standard deviations clamping affects nothing that matters. `mean`, `std` and
`deviations` are attributes of the group: z = latents * deviations * std + mean.

For Stable Diffusion's autoencoder and ImageNet, expect means of (1.56, -0.695, 0.483, 0.729) and deviations of (5.27,
5.91, 4.21, 4.31) (Lu & Song 2024, arXiv 2410.11081, appendix G.1).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.data.arrays import open_array
from udddm.data.images import format_shape
from udddm.errors import ConfigError, DataError
from udddm.files import load_json, write_json
from udddm.tools.dataset.output import Work, ZarrSink, open_sink, write_parts
from udddm.tools.dataset.place import measured_ids

DEVIATIONS = 8
"""Standard deviations that are stored as 1."""
Ids = npt.NDArray[np.int64]


class Autoencoder(Protocol):
    """Latents of images and back. Both are functions of their arguments only."""

    def encode(self, images: torch.Tensor, ids: Ids) -> torch.Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1], which are the samples `ids`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], about in [-1, 1], of latents."""


class ScriptAutoencoder:
    """A TorchScript file with the methods `encode` and `decode`. It is a program: name only files that you trust."""

    def __init__(self, file: Path, device: str) -> None:
        try:
            self._module = torch.jit.load(str(file), map_location=device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{file} is not a TorchScript file: {str(error).splitlines()[0]}") from error
        missing = [name for name in ("encode", "decode") if not hasattr(self._module, name)]
        if missing:
            raise ConfigError(
                f"{file} has no method {' and no method '.join(missing)}: export both with torch.jit.export, "
                "encode(images [B, 3, H, W] in [-1, 1]) -> latents and decode(latents) -> images"
            )
        self._device = device

    def encode(self, images: torch.Tensor, ids: Ids) -> torch.Tensor:
        with torch.no_grad():
            latents: torch.Tensor = self._module.encode(images.to(self._device))
        return latents.float().cpu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            images: torch.Tensor = self._module.decode(latents.to(self._device))
        return images.float().cpu()


class DiffusersAutoencoder:
    """A local folder of diffusers' AutoencoderKL, with weights in safetensors.

    A latent is a sample of the distribution of its image, with noise that is a function of the index of the image.
    """

    def __init__(self, folder: Path, device: str) -> None:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ConfigError(f"reading {folder} needs diffusers: pip install 'udddm[autoencoder]'") from error
        try:
            model = AutoencoderKL.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
        except Exception as error:  # OSError, ValueError, KeyError, SafetensorError and others
            raise ConfigError(f"{folder} is not a folder of diffusers' AutoencoderKL: {error}") from error
        self._model, self._device = model.eval().to(device), device

    def encode(self, images: torch.Tensor, ids: Ids) -> torch.Tensor:
        with torch.no_grad():
            found = self._model.encode(images.to(self._device)).latent_dist
        mean, std = found.mean.float().cpu(), found.std.float().cpu()
        noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(index)) for index in ids.tolist()]
        sampled: torch.Tensor = mean + std * torch.stack(noise)
        return sampled

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            decoded: torch.Tensor = self._model.decode(latents.to(self._device)).sample
        return decoded.float().cpu()


def open_autoencoder(where: Path, device: str) -> Autoencoder:
    """The autoencoder in a TorchScript file or a folder of diffusers. Raises ConfigError."""
    if where.is_dir():
        return DiffusersAutoencoder(where, device)
    if where.is_file():
        return ScriptAutoencoder(where, device)
    raise ConfigError(f"{where} does not exist: give a TorchScript file, or a local folder of diffusers' AutoencoderKL")


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel of the latents, [C] float64."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] as they are stored, not clamped."""
        at, by = (torch.from_numpy(each).float()[:, None, None] for each in (self.mean, DEVIATIONS * self.std))
        return (latents - at) / by


def encode(config: DataConfig, target: Path, where: Path, device: str, batch: int, measured: int) -> list[str]:
    """Write the latents of a data set, and its labels, to a Zarr group at `target`. Returns lines about them.

    The moments are measured over `measured` images. An interrupted call is resumed by another one with the same
    arguments. Raises DataError and ConfigError.
    """
    images = ImageDataset(load_dataset(config))
    autoencoder = open_autoencoder(where, device)
    plan = {
        "command": "encode",
        "autoencoder": _digest(where),
        "batch": batch,
        "measured": measured,
        "size": config.size,
        "data": images.fingerprint(),
        "version": 1,
    }
    work = Work(target, plan)
    if work.ended():
        return [f"{target} is complete"]
    with work.locked():
        moments = _kept_moments(work, images, autoencoder, measured, batch)

        def latents(ids: Ids) -> tuple[npt.NDArray[Any], dict[str, Any]]:
            return _encoded(images, autoencoder, moments, ids, batch)

        shape = tuple(autoencoder.encode(_rgb(images.batch(np.arange(1))[0]), np.arange(1)).shape[1:])
        attributes = {"mean": moments.mean.tolist(), "std": moments.std.tolist(), "deviations": DEVIATIONS}
        sink = ZarrSink(work, len(images), shape, "float16", attributes)
        parts = write_parts(work, sink, len(images), latents)
        labels = [label for facts in parts for label in facts["labels"]] if images.labelled else None
        clamped = sum(facts["clamped"] for facts in parts) / (len(images) * float(np.prod(shape)))
        work.finish(sink, None if labels is None else np.array(labels, np.int64), images.class_names)
    return [
        f"mean of each channel: {moments.mean.round(4).tolist()}",
        f"standard deviation of each channel: {moments.std.round(4).tolist()}",
        f"{clamped:.2g} of the values were clamped at {DEVIATIONS} standard deviations",
        f"{len(images)} latents of {format_shape(shape)} in {target}; to train on them, set data.name=array, "
        f"data.path={target} and schedule.sigma_data={1 / DEVIATIONS:g}",
    ]


@dataclass(frozen=True)
class Decoding:
    """Settings of `decode`: the autoencoder, its device, images per batch, and the format of the target."""

    autoencoder: Path
    device: str = "cpu"
    batch: int = 64
    kind: str = "zip"
    moments: str = ""
    """The Zarr group of `encode` whose attributes scale the latents. Default: the latents themselves."""


class Decoder:
    """Decodes scaled latents.

    Args:
        group: the group that `encode` wrote, whose attributes have the moments.
        autoencoder: the file or folder of the autoencoder.
        device: the device of the autoencoder.

    Raises DataError if the group has no such attributes, and ConfigError for a place that is no autoencoder.
    """

    def __init__(self, group: str, autoencoder: Path, device: str):
        self.moments, self.deviations = _recorded(group)
        self._group, self._autoencoder = group, open_autoencoder(autoencoder, device)
        mean, std = (torch.from_numpy(each).float()[:, None, None] for each in (self.moments.mean, self.moments.std))
        self._mean, self._std = mean, std

    def check(self, channels: int, name: str) -> None:
        """Raise DataError if latents `name` have another number of channels."""
        if channels != len(self._mean):
            raise DataError(f"{name} has {channels} channels, and the latents of {self._group} have {len(self._mean)}")

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] of scaled latents [B, C, h, w], on the host."""
        z = latents.float() * self.deviations * self._std + self._mean
        return self._autoencoder.decode(z).clamp(-1, 1)


def decode(latents: str, target: Path, settings: Decoding) -> str:
    """Write the images of latents as uint8 to `target`: those of `encode`, or samples of a model trained on them.

    Returns a line about them. Raises DataError if there are no attributes of `encode`, and ConfigError.
    """
    rows, batch = open_array(latents), settings.batch
    decoder = Decoder(settings.moments or latents, settings.autoencoder, settings.device)
    decoder.check(rows.batch(np.arange(1))[0].shape[1], latents)
    moments, deviations = decoder.moments, decoder.deviations

    def images(ids: Ids) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        found = []
        for some in np.array_split(ids, -(-len(ids) // batch)):
            decoded = decoder(torch.from_numpy(rows.batch(some)[0]))
            found.append(((decoded + 1) * 127.5).round().to(torch.uint8).numpy())
        return np.concatenate(found), {}

    plan = {
        "command": "decode",
        "autoencoder": _digest(settings.autoencoder),
        "batch": batch,
        "format": settings.kind,
        "moments": [moments.mean.tolist(), moments.std.tolist(), deviations],
        "data": ImageDataset(rows).fingerprint(),
        "version": 1,
    }
    work = Work(target, plan)
    if work.ended():
        return f"{target} is complete"
    with work.locked():
        sink = open_sink(work, settings.kind, len(rows), images(np.arange(1))[0].shape[1:])
        write_parts(work, sink, len(rows), images)
        work.finish(sink, rows.labels, rows.class_names)
    return f"{len(rows)} images in {target}"


def _recorded(group: str) -> tuple[Moments, float]:
    """The moments and the number of deviations that `encode` wrote. Raises DataError."""
    import zarr

    try:
        attributes: dict[str, Any] = dict(zarr.open_group(group, mode="r").attrs)
        mean, std = (np.array(attributes[key], np.float64) for key in ("mean", "std"))
        deviations = float(attributes["deviations"])
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{group} lacks the attributes mean, std and deviations of udddm data encode") from error
    if mean.ndim != 1 or mean.shape != std.shape or not np.isfinite([*mean, *std, deviations]).all():
        raise DataError(f"the attributes mean, std and deviations of {group} are not those of udddm data encode")
    return Moments(mean, std), deviations


def _encoded(
    images: ImageDataset, autoencoder: Autoencoder, moments: Moments, ids: Ids, batch: int
) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """The latents of a part, float16 as stored, with its labels and the number of values that were clamped."""
    rows: list[npt.NDArray[Any]] = []
    labels: list[int] = []
    beyond = 0
    for some in np.array_split(ids, -(-len(ids) // batch)):
        pixels, own = images.batch(some)
        scaled = moments.scaled(autoencoder.encode(_rgb(pixels), some))
        if not bool(scaled.isfinite().all()):
            raise DataError(f"the autoencoder gives NaN or infinite latents for the samples {some[0]}..{some[-1]}")
        beyond += int((scaled.abs() > 1).sum())
        rows.append(scaled.clamp(-1, 1).half().numpy())
        labels += [] if own is None else own.tolist()
    return np.concatenate(rows), {"clamped": beyond, "labels": labels}


def _kept_moments(work: Work, images: ImageDataset, autoencoder: Autoencoder, measured: int, batch: int) -> Moments:
    """The moments, measured once, so that a resumed command scales by the same ones."""
    file = work.place / "moments.json"
    if not file.exists():
        found = measure(images, autoencoder, measured, batch)
        write_json(file, {"mean": found.mean.tolist(), "std": found.std.tolist()})
    kept = load_json(file, "mean", "std")
    return Moments(np.array(kept["mean"], np.float64), np.array(kept["std"], np.float64))


def measure(images: ImageDataset, autoencoder: Autoencoder, count: int, batch: int) -> Moments:
    """The moments of the latents of `count` images, evenly spaced. Raises DataError for a constant channel."""
    ids = measured_ids(len(images), count)
    total: npt.NDArray[np.float64] | float = 0.0
    squares: npt.NDArray[np.float64] | float = 0.0
    values = 0
    for some in np.array_split(ids, -(-len(ids) // batch)):
        z = autoencoder.encode(_rgb(images.batch(some)[0]), some).double().numpy()
        total, squares = total + z.sum((0, 2, 3)), squares + np.square(z).sum((0, 2, 3))
        values += z[:, 0].size
    mean = np.asarray(total) / values
    std = np.sqrt(np.maximum(np.asarray(squares) / values - mean**2, 0))
    if not (np.isfinite(std).all() and (std > 0).all()):
        raise DataError(f"the latents have channels of standard deviation {std.tolist()}: is it the right autoencoder?")
    return Moments(mean, std)


def _rgb(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W]: gray ones with three equal channels. Raises DataError for other numbers of channels."""
    if images.shape[1] not in (1, 3):
        raise DataError(f"images of {images.shape[1]} channels cannot be encoded: give gray or RGB images")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _digest(where: Path) -> str:
    """A digest of the files of an autoencoder."""
    files = [where] if where.is_file() else sorted([*where.glob("*.json"), *where.glob("*.safetensors")])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
