"""Scores of samples against a data set, whose own statistics are computed once and kept."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from udddm.backends.distributed.ranks import choose_device
from udddm.data import ImageDataset, MapDataset
from udddm.data.download import cache_directory
from udddm.errors import DataError
from udddm.evaluation import metrics
from udddm.evaluation.features import INCEPTION, FeatureNetwork, Rows, extract, load_features

T = TypeVar("T")
BATCH = 256
STANDARD = 50_000
"""Images on which published FIDs stand: fewer give higher ones."""
MANIFOLD = 2000
"""Images of either side on which precision and recall are computed."""
KERNEL = 10_000
"""Images of the data set that KID draws its subsets from."""


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """`items`, made in a background thread while the caller works on the ones before."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting = [pool.submit(next, iterator, end) for _ in range(depth)]
        while (item := waiting.pop(0).result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]


@dataclass(frozen=True)
class Reference:
    """A data set in a feature space."""

    mean: metrics.Array
    covariance: metrics.Array
    probe: Rows
    """[at most KERNEL, D]: features of images drawn at random, the last MANIFOLD of them for precision and recall."""

    @property
    def moments(self) -> tuple[metrics.Array, metrics.Array]:
        return self.mean, self.covariance


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
            path.unlink()  # half a file of a full disk: make it anew
    features, _ = extract(network, prefetch(_read(dataset)))
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[-KERNEL:].numpy()
    found = Reference(*metrics.moments(features), features[drawn])
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        np.savez(file, mean=found.mean, covariance=found.covariance, probe=found.probe)
    temporary.replace(path)
    return found


def score(features: Rows, logits: Rows | None, real: Reference, name: str) -> dict[str, Any]:
    """The figures of samples with these features. `name` is the feature network's: FID is only Inception's."""
    own = metrics.moments(features)
    precision, recall = metrics.precision_recall(real.probe[-MANIFOLD:], features[:MANIFOLD])
    distance = "fid" if name == INCEPTION else "fd"
    kid, kid_deviation = metrics.kernel_distance(real.probe, features)
    spread = metrics.spread(real.moments, own)
    found: dict[str, Any] = {
        "n": len(features),
        distance: metrics.frechet(own, real.moments),
        "kid": kid,
        "kid_deviation": kid_deviation,
        "precision": precision,
        "recall": recall,
        "spread": spread,
        "collapsed": bool(spread < metrics.COLLAPSED),
    }
    if logits is not None:
        found["inception_score"], found["inception_score_deviation"] = metrics.inception_score(logits)
    return found


def evaluate(
    images: npt.NDArray[np.floating[Any]] | torch.Tensor,
    dataset: MapDataset,
    *,
    features: str = INCEPTION,
    device: str = "auto",
    cache: Path | None = None,
) -> dict[str, Any]:
    """Score `images` [N, C, H, W] in [-1, 1] against `dataset`: what `udddm-evaluate --samples` says, as a dict.

    Keys: n, fid (fd in another feature space than Inception's), kid, precision, recall, spread, collapsed, and
    inception_score where the network has logits. Raises ConfigError for a feature network that cannot be had, and
    DataError for images of another shape than the data set's.
    """
    real, rows = ImageDataset(dataset), torch.as_tensor(images)
    if tuple(rows.shape[1:]) != real.shape or len(rows) < 2:
        raise DataError(f"the images are {list(rows.shape)}: wanted two or more [N, {', '.join(map(str, real.shape))}]")
    network = load_features(features, choose_device(device))
    return score(*extract(network, torch.split(rows, BATCH)), reference(real, network, cache), network.name)


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
    """What a reader must know before quoting these figures."""
    lines = []
    if found["n"] < STANDARD and "fid" in found:
        lines.append(f"NOTE: {found['n']} images. FID falls with their number: published figures stand on {STANDARD:,}")
    if found["collapsed"]:
        lines.append(
            f"NOTE: COLLAPSED. The samples vary {found['spread']:.3f} times as much as the data: nearly all are alike"
        )
    return lines
