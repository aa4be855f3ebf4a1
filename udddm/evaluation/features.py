"""Feature networks: Inception and DINOv2 with their published weights, a TorchScript file, or a user's function."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm.config.evaluate import PUBLISHED_NETWORKS
from udddm.config.plugins import load_plugin
from udddm.errors import ConfigError, DataError
from udddm.evaluation import weights as published
from udddm.evaluation.dinov2 import DINOv2
from udddm.evaluation.inception import Inception
from udddm.files import expanded

Rows = npt.NDArray[np.float32]
INCEPTION, DINOV2 = PUBLISHED_NETWORKS
BATCH = 64
"""Images that a published network evaluates at once, which bounds the memory of its activations."""


class FeatureNetwork:
    """Maps images [B, C, H, W], float32 in [-1, 1], to features [B, D], and logits [B, K] if the network has them.

    `call` returns either features or (features, logits).
    """

    def __init__(self, name: str, call: Callable[[torch.Tensor], Any], device: torch.device, weights: str = ""):
        self.name, self._call, self.device, self._weights = name, call, device, weights

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[Rows, Rows | None]:
        """Raises DataError if an image is not finite, ConfigError if features or logits are not, or are not [B, D]."""
        if not (finite := images.isfinite().flatten(1).all(1)).all():
            raise DataError(f"image {int((~finite).nonzero()[0])} of a batch to score has values that are not finite")
        found = self._call(images.to(self.device, torch.float32).clamp(-1, 1))
        features, logits = found if isinstance(found, (tuple, list)) else (found, None)
        for what, rows in (("features", features), ("logits", logits)):
            if rows is None:
                continue
            if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != len(images):
                shape = list(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
                raise ConfigError(
                    f"the feature network {self.name} returned {what} {shape} for {len(images)} images: expected [B, D]"
                )
            if not rows.isfinite().all():
                raise ConfigError(f"the feature network {self.name} returned {what} that are not finite")
        return _host(features), None if logits is None else _host(logits)

    def dimension(self, shape: tuple[int, int, int]) -> int:
        """The number of features of an image of `shape` (C, H, W), found by evaluating two black ones."""
        return int(self(torch.full((2, *shape), -1.0))[0].shape[1])

    def fingerprint(self, shape: tuple[int, int, int]) -> str:
        """A hash that identifies the network and its weights, for images of `shape` (C, H, W).

        It covers the weights if they are known, and is then the same on every device. Otherwise, it covers the features
        of fixed images.
        """
        if self._weights:
            return hashlib.sha256(f"{self._weights} {shape}".encode()).hexdigest()[:16]
        generator = torch.Generator().manual_seed(0)
        features, _ = self(torch.randn(4, *shape, generator=generator).clamp(-1, 1))
        return hashlib.sha256(features.tobytes()).hexdigest()[:16]


def _host(rows: torch.Tensor) -> Rows:
    array: Rows = rows.detach().float().cpu().numpy()
    return array


def load_features(name: str, device: torch.device, weights: Mapping[str, str | None] | None = None) -> FeatureNetwork:
    """Load `inception`, `dinov2`, a TorchScript file, or `package.module:function`, which is called with images
    [B, C, H, W].

    `weights` has the place of the weights of inception and dinov2, by name, as `udddm.evaluation.weights.locate` takes
    it; without one, the published file is used. With other weights than those, the name of the network has the first
    digits of their SHA-256: only the published ones give figures that compare with those of others.

    Raises ConfigError if it cannot be loaded; the message names what to install or correct.
    """
    if name in PUBLISHED_NETWORKS:
        return _published(name, device, (weights or {}).get(name))
    if Path(name).suffix in (".pt", ".pth", ".ts", ".jit"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, but still common
                module = torch.jit.load(str(expanded(name)), map_location=device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"cannot load the feature network {name} as TorchScript: {reason}. Weights of inception or dinov2 are "
                "named with --inception-weights or --dinov2-weights (evaluate.inception_weights, dinov2_weights)"
            ) from error
        return FeatureNetwork(name, module, device, hashlib.sha256(expanded(name).read_bytes()).hexdigest())
    if ":" in name:
        return FeatureNetwork(name, load_plugin(name, "feature network"), device)
    raise ConfigError(
        f"feature network {name!r}: write {', '.join(PUBLISHED_NETWORKS)}, a TorchScript file (.pt), or "
        "package.module:function"
    )


def _published(name: str, device: torch.device, given: str | None) -> FeatureNetwork:
    source = published.INCEPTION if name == INCEPTION else published.DINOV2
    path, sha256 = published.locate(source, given)
    tensors = published.read(path)
    if name == INCEPTION:
        with torch.device("meta"):
            network: nn.Module = Inception()
    else:
        try:
            network = DINOv2.of(tensors)
        except ValueError as error:
            raise ConfigError(f"{path} has weights of another network: {error}") from None
    filled = published.fill(network, tensors, path).to(device)
    shown = name if sha256 == source.sha256 else f"{name}#{sha256[:8]}"
    return FeatureNetwork(shown, partial(_call_published, name, filled), device, f"{name} {sha256}")


def check_channels(name: str, channels: int) -> None:
    """Raise ConfigError if the feature network `name` does not take images with this number of channels."""
    if name in PUBLISHED_NETWORKS and channels not in (1, 3):
        raise ConfigError(
            f"feature network {name}: it takes gray and RGB images, but these have {channels} channels. Decode "
            "latents first and score the images, or use a custom feature network (package.module:function)"
        )


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 1 or 3, H, W] in [-1, 1] as RGB, uint8 [B, 3, H, W]: rounded to the nearest of 256 values, gray ones
    repeated."""
    pixels = images.add(1).mul(127.5).round().byte()
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


def _call_published(name: str, network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_channels(name, images.shape[1])
    found = [network(part) for part in torch.split(to_pixels(images), BATCH)]
    if isinstance(found[0], torch.Tensor):
        return torch.cat(found), None
    return torch.cat([features for features, _ in found]), torch.cat([logits for _, logits in found])


def extract_each(networks: Sequence[FeatureNetwork], batches: Iterable[torch.Tensor]) -> list[tuple[Rows, Rows | None]]:
    """For each network, the features [N, D], and logits [N, K] or None, of all images of `batches`, which is read once.

    Without images, features are [0, 0].
    """
    found: list[list[tuple[Rows, Rows | None]]] = [[] for _ in networks]
    for batch in batches:
        for network, rows in zip(networks, found, strict=True):
            rows.append(network(batch))
    return [join(rows) for rows in found]


def extract(network: FeatureNetwork, batches: Iterable[torch.Tensor]) -> tuple[Rows, Rows | None]:
    """The features [N, D], and logits [N, K] or None, of all images of `batches`."""
    return extract_each([network], batches)[0]


def join(parts: Sequence[tuple[Rows, Rows | None]]) -> tuple[Rows, Rows | None]:
    """Parts of features and logits in one piece."""
    if not parts:
        return np.empty((0, 0), np.float32), None
    logits = None if parts[0][1] is None else np.concatenate([rows for _, rows in parts if rows is not None])
    return np.concatenate([rows for rows, _ in parts]), logits
