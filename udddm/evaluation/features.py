"""Feature networks: the standard Inception network, a TorchScript file, or a user's function."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from udddm.config.plugins import load_plugin
from udddm.errors import ConfigError
from udddm.files import expanded

Rows = npt.NDArray[np.float32]
INCEPTION = "inception"


class FeatureNetwork:
    """Maps images [B, C, H, W], float32 in [-1, 1], to features [B, D], and logits [B, K] if the network has them.

    `call` returns either features or (features, logits).
    """

    def __init__(self, name: str, call: Callable[[torch.Tensor], Any], device: torch.device, weights: str = ""):
        self.name, self._call, self.device, self._weights = name, call, device, weights

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[Rows, Rows | None]:
        """Raises ConfigError if the features or logits are not [B, D]."""
        found = self._call(images.to(self.device, torch.float32).clamp(-1, 1))
        features, logits = found if isinstance(found, (tuple, list)) else (found, None)
        for what, rows in (("features", features), ("logits", logits)):
            if rows is not None and (not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != len(images)):
                shape = list(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
                raise ConfigError(
                    f"the feature network {self.name} returned {what} {shape} for {len(images)} images: expected [B, D]"
                )
        return _host(features), None if logits is None else _host(logits)

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


def load_features(name: str, device: torch.device) -> FeatureNetwork:
    """Load `inception`, a TorchScript file, or `package.module:function`, which is called with images [B, C, H, W].

    Raises ConfigError if it cannot be loaded; the message names what to install or correct.
    """
    if name == INCEPTION:
        network = _inception(device)
        return FeatureNetwork(name, partial(_call_inception, network), device, _hash(network.state_dict().values()))
    if Path(name).suffix in (".pt", ".pth", ".ts", ".jit"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, but still common
                module = torch.jit.load(str(expanded(name)), map_location=device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"cannot load the feature network {name} as TorchScript: {reason}") from error
        return FeatureNetwork(name, module, device, hashlib.sha256(Path(name).read_bytes()).hexdigest())
    if ":" in name:
        return FeatureNetwork(name, load_plugin(name, "feature network"), device)
    raise ConfigError(
        f"feature network {name!r}: write {INCEPTION}, a TorchScript file (.pt), or package.module:function"
    )


def _hash(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the bytes of tensors, in hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_channels(name: str, channels: int) -> None:
    """Raise ConfigError if the feature network `name` does not take images with this number of channels."""
    if name == INCEPTION and channels not in (1, 3):
        raise ConfigError(
            f"feature network {INCEPTION}: it takes gray and RGB images, but these have {channels} channels. Decode "
            "latents first and score the images, or use a custom feature network (package.module:function)"
        )


def _inception(device: torch.device) -> nn.Module:
    """The Inception network of the TensorFlow FID code, ported by torch-fidelity: 2,048 features, 1,008 logits."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            "the Inception network needs torch-fidelity, which is not installed: pip install 'udddm[inception]', "
            "or choose another feature network (--features FILE.pt or package.module:function)"
        ) from error
    network: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    return network.to(device).eval()


def _call_inception(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_channels(INCEPTION, images.shape[1])
    pixels = images.add(1).mul(127.5).round().byte()
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    features, logits = network(pixels)
    return features.flatten(1), logits


def extract(network: FeatureNetwork, batches: Iterable[torch.Tensor]) -> tuple[Rows, Rows | None]:
    """The features [N, D], and logits [N, K] or None, of all images of `batches`."""
    found = [network(batch) for batch in batches]
    if not found:
        return np.empty((0, 0), np.float32), None
    features = np.concatenate([rows for rows, _ in found])
    logits = None if found[0][1] is None else np.concatenate([rows for _, rows in found if rows is not None])
    return features, logits
