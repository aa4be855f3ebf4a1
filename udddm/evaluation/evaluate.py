"""Scores of samples against a data set, whose own statistics are computed once and kept."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from udddm.backends.distributed.ranks import choose_device
from udddm.config.plugins import METRICS, name_of
from udddm.data import ImageDataset, MapDataset
from udddm.data.download import cache_directory
from udddm.errors import ConfigError, DataError
from udddm.evaluation import metrics
from udddm.evaluation.features import INCEPTION, FeatureNetwork, Rows, extract, load_features
from udddm.evaluation.metrics import KERNEL, MetricInput, Reference
from udddm.files import atomic_write, make_directory

T = TypeVar("T")
BATCH = 256
STANDARD = 50_000
"""Images on which published FIDs stand: fewer give higher ones."""


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """`items`, made in a background thread while the caller works on the ones before."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        waiting = [pool.submit(next, iterator, end) for _ in range(depth)]
        while (item := waiting.pop(0).result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]


def _read(dataset: ImageDataset) -> Iterator[torch.Tensor]:
    for first in range(0, len(dataset), BATCH):
        yield dataset.batch(np.arange(first, min(first + BATCH, len(dataset))))[0]


def dataset_hash(dataset: ImageDataset) -> str:
    """SHA-256 of every image of the data set, in order."""
    found = hashlib.sha256(repr((len(dataset), dataset.shape)).encode())
    for images in prefetch(_read(dataset)):
        found.update(images.numpy().tobytes())
    return found.hexdigest()[:16]


def reference(dataset: ImageDataset, network: FeatureNetwork, cache: Path | None = None) -> Reference:
    """The statistics of all of `dataset`, from the cache where it has those of the same images and network."""
    directory = cache or cache_directory() / "evaluation"
    path = directory / f"{dataset_hash(dataset)}-{network.fingerprint(dataset.shape)}.npz"
    if path.exists():
        try:
            with path.open("rb") as source, np.load(source) as saved:
                return Reference(saved["mean"], saved["covariance"], saved["probe"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)  # not complete: computed again
    features, _ = extract(network, prefetch(_read(dataset)))
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[-KERNEL:].numpy()
    found = Reference(*metrics.moments(features), features[drawn])

    def write(file: BinaryIO) -> None:
        np.savez(file, mean=found.mean, covariance=found.covariance, probe=found.probe)

    make_directory(directory)
    atomic_write(path, write, shared=True)
    return found


def score(
    features: Rows, logits: Rows | None, real: Reference, name: str, chosen: Sequence[str] = tuple(METRICS.members)
) -> dict[str, Any]:
    """The figures of samples with these features. `name` is the feature network's: FID is only Inception's. `chosen`
    names the metrics (`evaluate.metrics`)."""
    found: dict[str, Any] = {"n": len(features)}
    given = MetricInput(features, logits, real, "fid" if name == INCEPTION else "fd")
    for metric in chosen:
        figures = METRICS.build(metric, {}, given)
        if not isinstance(figures, Mapping):
            raise ConfigError(
                f"the metric {metric} returned a {type(figures).__name__}; return a dict of figures by name"
            )
        found |= {key: value.item() if hasattr(value, "item") else value for key, value in figures.items()}
    return found


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found. A figure is None where its metric was not chosen or does not apply."""

    n: int
    """Images that were scored."""
    fid: float | None = None
    """Frechet distance in Inception's feature space."""
    fd: float | None = None
    """Frechet distance in any other feature space."""
    kid: float | None = None
    kid_deviation: float | None = None
    """Standard deviation of the kernel distance over its random subsets."""
    precision: float | None = None
    """Share of the samples within the data's manifold."""
    recall: float | None = None
    """Share of the data within the samples' manifold."""
    spread: float | None = None
    """Total variance of the samples' features over that of the data's."""
    collapsed: bool | None = None
    """Whether nearly all samples are alike."""
    inception_score: float | None = None
    inception_score_deviation: float | None = None
    other: Mapping[str, Any] = field(default_factory=dict)
    """Figures of metrics of your own."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        return cls(**known, other={key: value for key, value in values.items() if key not in known})

    def to_dict(self) -> dict[str, Any]:
        """The figures that there are, by name."""
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
    metrics: Sequence[str | Callable[..., Any]] = tuple(METRICS.members),
    device: str = "auto",
    cache: Path | None = None,
) -> Scores:
    """Score `images` [N, C, H, W] in [-1, 1] against `dataset`, as `udddm-evaluate --samples` does.

    `features` is inception, a TorchScript file, or package.module:function; `metrics` are names, or functions of your
    own (docs/extending.md). Raises ConfigError for a feature network or metric that cannot be loaded, and DataError for
    images of another shape than the data set's.
    """
    chosen = _metric_names(metrics)
    real, rows = ImageDataset(dataset), torch.as_tensor(images)
    if tuple(rows.shape[1:]) != real.shape or len(rows) < 2:
        raise DataError(f"the images are {list(rows.shape)}: wanted two or more [N, {', '.join(map(str, real.shape))}]")
    network = load_features(features, choose_device(device))
    extracted = extract(network, torch.split(rows, BATCH))
    return Scores.from_dict(score(*extracted, reference(real, network, cache), network.name, chosen))


def _metric_names(metrics: Sequence[str | Callable[..., Any]]) -> list[str]:
    """The names of metrics, before anything is computed. Raises ConfigError."""
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise ConfigError(f"metrics: give a list of names or functions, such as ['frechet'], not {metrics!r}")
    names = [name_of(metric, "metrics") for metric in metrics]
    for name in names:
        METRICS.load(name)
    return names


def summarize(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over repetitions as `key`, and standard deviations as `key_over_seeds` where there are several."""
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
    """Remarks that belong to these figures wherever they are quoted."""
    lines = []
    if found["n"] < STANDARD and "fid" in found:
        lines.append(f"NOTE: {found['n']} images. FID falls with their number: published figures stand on {STANDARD:,}")
    if found.get("collapsed"):
        lines.append(
            f"NOTE: COLLAPSED. The samples vary {found['spread']:.3f} times as much as the data: nearly all are alike"
        )
    return lines


def figures(found: Mapping[str, Any]) -> list[str]:
    """The figures of metrics of your own, as `name value`."""
    own = {key: value for key, value in found.items() if key not in Scores.__dataclass_fields__}
    shown = {key: value for key, value in own.items() if not key.endswith("_over_seeds")}
    return [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
