"""Scores of samples against a data set. The statistics of the data set are computed once and cached."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from udddm.backends.distributed.ranks import choose_device
from udddm.config.evaluate import PUBLISHED_NETWORKS
from udddm.config.plugins import METRICS, name_of
from udddm.data import ImageDataset, MapDataset
from udddm.data.download import cache_directory
from udddm.data.images import format_shape
from udddm.errors import ConfigError, DataError
from udddm.evaluation import metrics
from udddm.evaluation.features import INCEPTION, FeatureNetwork, Rows, extract, extract_each, load_features
from udddm.evaluation.metrics import KERNEL, NEED_FEATURES, MetricInput, Reference
from udddm.evaluation.reference import ReferenceFile
from udddm.files import atomic_write, make_directory
from udddm.log import log
from udddm.storage.threads import Worker

T = TypeVar("T")
BATCH = 256
PATIENCE = 2.0
"""Seconds that `prefetch` waits for an unfinished item when it is closed."""
STANDARD = 50_000
"""The number of images that published FIDs use. Fewer images give a higher FID."""


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yields `items`, produced up to `depth` ahead in a background thread."""
    iterator, end = iter(items), object()
    following = partial(next, iterator, end)
    worker = Worker("prefetch")
    try:
        waiting = [worker.submit(following) for _ in range(depth)]
        while (item := waiting.pop(0).result()) is not end:
            waiting.append(worker.submit(following))
            yield item
    finally:
        worker.close(PATIENCE)


def _read(dataset: ImageDataset, check: Callable[[], None]) -> Iterator[torch.Tensor]:
    for first in range(0, len(dataset), BATCH):
        check()
        yield dataset.batch(np.arange(first, min(first + BATCH, len(dataset))))[0]


def _proceed() -> None:
    """The default of `check` below."""


def dataset_hash(dataset: ImageDataset, check: Callable[[], None] = _proceed) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all images of the data set, in order."""
    found = hashlib.sha256(repr((len(dataset), dataset.shape)).encode())
    for images in prefetch(_read(dataset, check)):
        found.update(images.numpy().tobytes())
    return found.hexdigest()[:16]


def reference(
    dataset: ImageDataset, network: FeatureNetwork, cache: Path | None = None, check: Callable[[], None] = _proceed
) -> Reference:
    """The statistics of all of `dataset`, read from the cache if it has them for the same images and network.

    `check` is called before each batch is read, in another thread. It may raise an error to end the computation.
    """
    directory = cache or cache_directory() / "evaluation"
    path = directory / f"{dataset_hash(dataset, check)}-{network.fingerprint(dataset.shape)}.npz"
    if path.exists():
        try:
            with path.open("rb") as source, np.load(source) as saved:
                return Reference(saved["mean"], saved["covariance"], saved["probe"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)  # incomplete: recomputed below
    features, _ = extract(network, prefetch(_read(dataset, check)))
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[-KERNEL:].numpy()
    found = Reference(*metrics.moments(features), features[drawn])

    def write(file: BinaryIO) -> None:
        np.savez(file, mean=found.mean, covariance=found.covariance, probe=found.probe)

    try:
        make_directory(directory)
        atomic_write(path, write, shared=True)
    except OSError as error:  # a full or read-only disk
        log.warning(f"the statistics of the data set are not cached: {error}")
    return found


def reference_of(
    file: ReferenceFile,
    network: FeatureNetwork,
    shape: tuple[int, int, int],
    cache: Path | None = None,
    check: Callable[[], None] = _proceed,
) -> Reference:
    """The statistics in a file of reference statistics, for samples of `shape` (C, H, W).

    The moments of the file, if they have the network's number of features, are used for Frechet distance and spread,
    and features of its images for the other metrics. Without images, `Reference.rows` is None.

    Raises DataError if its images are of another size than the samples, and if it has no images, and moments of another
    number of features.
    """
    check_reference(file, network, shape)
    found = None if file.images is None else reference(file.images, network, cache, check)
    if file.moments is not None and (found is None or len(file.moments[0]) == len(found.mean)):
        log.info(f"{file.path} does not name its feature network: its statistics are taken to be of {network.name}")
        return Reference(*file.moments, None if found is None else found.rows)
    assert found is not None
    return found


def check_reference(file: ReferenceFile, network: FeatureNetwork, shape: tuple[int, int, int]) -> None:
    """Raise the errors of `reference_of`, before samples are drawn."""
    if file.images is not None:
        check_same_size(str(file.path), file.images.shape, shape)
    elif file.moments is not None and (given := len(file.moments[0])) != (size := network.dimension(shape)):
        raise DataError(
            f"{file.path} has statistics of {given} features, and the feature network {network.name} has {size}: they "
            "are of another network"
        )


def check_same_size(name: str, images: tuple[int, int, int], samples: tuple[int, int, int]) -> None:
    """Raise DataError if images of shape (C, H, W) and samples have different heights or widths."""
    if images[1:] != samples[1:]:
        raise DataError(
            f"{name} has images of {format_shape(images)}, and the samples are {format_shape(samples)}: a distance "
            "between them would measure their resolutions. Give images of the samples' size"
        )


def applicable(metrics: Sequence[str] | None, real: ReferenceFile | None, *, quiet: bool = False) -> list[str]:
    """The metrics to compute: `metrics`, or by default all that the reference allows, with a warning unless `quiet`.

    Raises ConfigError for one of `metrics` that needs features, if the reference has only moments.
    """
    names = list(METRICS.members) if metrics is None else list(metrics)
    if real is None or real.images is not None:
        return names
    missing = [name for name in names if name in NEED_FEATURES]
    if missing and metrics is not None:
        raise ConfigError(
            f"the metrics {', '.join(missing)} need features of the reference, and {real.path} has only their mean and "
            "covariance: leave them out, or give a reference with images (arr_0)"
        )
    if missing and not quiet:
        log.warning(f"not computed, because {real.path} has only mean and covariance: {', '.join(missing)}")
    return [name for name in names if name not in missing]


def held_out(features: Rows, others: Rows, real: Reference) -> dict[str, float]:
    """How far samples are from the reference, relative to real images that are not in it.

    Args:
        features: features of the samples, [N, D].
        others: features of held-out real images, [M, D].
        real: statistics of the reference.

    Returns `fd_held_out`, the Frechet distance of held-out images, and `fd_ratio`, that of samples divided by it. Both
    are computed from min(N, M) images, because the distance decreases with their number.
    """
    count = min(len(features), len(others))
    model, floor = (metrics.frechet(metrics.moments(rows[:count]), real.moments) for rows in (features, others))
    return {"fd_held_out": floor, "fd_ratio": model / max(floor, 1e-12)}


def features_of(dataset: ImageDataset, networks: Sequence[FeatureNetwork]) -> list[tuple[Rows, Rows | None]]:
    """For each network, features [N, D] and logits [N, K] or None of all images of a data set, which is read once."""
    return extract_each(networks, prefetch(_read(dataset, _proceed)))


def score(
    features: Rows, logits: Rows | None, real: Reference, name: str, chosen: Sequence[str] = tuple(METRICS.members)
) -> dict[str, Any]:
    """Compute the metrics `chosen` (`evaluate.metrics`) of samples.

    Args:
        features: features of the samples, [N, D].
        logits: logits of the samples, [N, K], or None.
        real: statistics of the data set in the same feature space.
        name: name of the feature network. The Frechet distance is called FID only for Inception.
        chosen: names of the metrics.

    Raises ConfigError if a metric does not return a mapping.
    """
    found: dict[str, Any] = {"n": len(features)}
    given = MetricInput(features, logits, real, "fid" if name == INCEPTION else "fd")
    for metric in chosen:
        figures = METRICS.build(metric, {}, given)
        if not isinstance(figures, Mapping):
            raise ConfigError(
                f"the metric {metric} returned a {type(figures).__name__}; return a dict from names to numbers"
            )
        found |= {key: value.item() if hasattr(value, "item") else value for key, value in figures.items()}
    return found


def combined(networks: Sequence[str], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores in several feature spaces: those of the first of `networks`, and those of the others by name under the key
    `networks`."""
    others = dict(zip(networks[1:], scores[1:], strict=True))
    return {**scores[0], **({"networks": others} if others else {})}


@dataclass(frozen=True)
class Scores:
    """The result of `evaluate`. A score is None if its metric was not selected or does not apply."""

    n: int
    """Number of images that were scored."""
    fid: float | None = None
    """Frechet distance in Inception's feature space."""
    fd: float | None = None
    """Frechet distance in any other feature space."""
    kid: float | None = None
    """Kernel distance; KID in Inception's feature space."""
    kid_deviation: float | None = None
    """Standard deviation of the kernel distance over random subsets."""
    precision: float | None = None
    """Fraction of the samples that lie within the data's manifold."""
    recall: float | None = None
    """Fraction of the data that lies within the samples' manifold."""
    spread: float | None = None
    """Total variance of the samples' features, divided by that of the data's features."""
    collapsed: bool | None = None
    """Whether nearly all samples are alike."""
    inception_score: float | None = None
    """Inception Score, if the feature network has logits."""
    inception_score_deviation: float | None = None
    """Standard deviation of the Inception Score over its splits."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Scores of custom metrics, by name."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """The inverse of `to_dict`."""
        known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        return cls(**known, other={key: value for key, value in values.items() if key not in known})

    def to_dict(self) -> dict[str, Any]:
        """The scores that are not None, by name."""
        found = {key: value for key, value in asdict(self).items() if key != "other" and value is not None}
        return {**found, **self.other}

    def __getitem__(self, key: str) -> Any:
        """`scores["fid"]` is `scores.fid`."""
        return self.to_dict()[key]


def evaluate(
    images: npt.NDArray[np.floating[Any]] | torch.Tensor,
    dataset: MapDataset,
    *,
    features: str = INCEPTION,
    weights: str | None = None,
    metrics: Sequence[str | Callable[..., Any]] = tuple(METRICS.members),
    device: str = "auto",
    cache: Path | None = None,
) -> Scores:
    """Score `images` [N, C, H, W] in [-1, 1] against `dataset`, as `udddm-evaluate --samples` does.

    Args:
        images: two or more samples.
        dataset: a map-style data set.
        features: inception, dinov2, a TorchScript file, or package.module:function.
        weights: file or URL of the weights of inception or dinov2, with #sha256=HEX unless they are the published ones
            (docs/evaluation.md).
        metrics: names of metrics, or functions (docs/extending.md).
        device: auto, cpu or cuda.
        cache: directory for the data set's statistics. None: the user's cache directory.

    Raises ConfigError if a feature network or metric cannot be loaded, and DataError if the shape of the images differs
    from the data set's.
    """
    chosen = _metric_names(metrics)
    real, rows = ImageDataset(dataset), torch.as_tensor(images)
    if tuple(rows.shape[1:]) != real.shape or len(rows) < 2:
        raise DataError(
            f"images of shape {list(rows.shape)}: expected two or more [N, {', '.join(map(str, real.shape))}]"
        )
    if weights is not None and features not in PUBLISHED_NETWORKS:
        raise ConfigError(f"weights={weights!r} has no effect on the feature network {features!r}")
    network = load_features(features, choose_device(device), {features: weights})
    extracted = extract(network, torch.split(rows, BATCH))
    return Scores.from_dict(score(*extracted, reference(real, network, cache), network.name, chosen))


def _metric_names(metrics: Sequence[str | Callable[..., Any]]) -> list[str]:
    """The names of metrics, each of which is imported. Raises ConfigError."""
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise ConfigError(f"metrics: give a list of names or functions, such as ['frechet'], not {metrics!r}")
    names = [name_of(metric, "metrics") for metric in metrics]
    for name in names:
        METRICS.load(name)
    return names


def summarize(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over repetitions as `key`, and standard deviations as `key_over_seeds` if there are several."""
    found: dict[str, Any] = {}
    for key, first in scores[0].items():
        values = [one[key] for one in scores]
        if isinstance(first, bool):
            found[key] = any(values)
        else:
            found[key] = first if key == "n" else float(np.mean(values))
            if len(scores) > 1 and key != "n":
                found[f"{key}_over_seeds"] = float(np.std(values, ddof=1))
    return found


def notes(found: dict[str, Any]) -> list[str]:
    """Notes to print with these scores."""
    lines = []
    if found["n"] < STANDARD and "fid" in found:
        lines.append(f"NOTE: {found['n']} images. FID decreases with their number; published FIDs use {STANDARD:,}")
    if found.get("collapsed"):
        lines.append(
            f"NOTE: COLLAPSED. The samples' variance is {found['spread']:.3f} times the data's: nearly all are alike"
        )
    return lines


def figures(found: Mapping[str, Any]) -> list[str]:
    """The scores of custom metrics, as `name value`."""
    own = {key: value for key, value in found.items() if key not in Scores.__dataclass_fields__}
    shown = {key: value for key, value in own.items() if not key.endswith("_over_seeds")}
    return [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
