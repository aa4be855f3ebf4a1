"""Published weights of feature networks: found on this machine or downloaded, and verified by their SHA-256.

They are read as tensors, whose names and shapes must be those of the network. Nothing in a file is executed
(`torch.load` with `weights_only`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import nn

from udddm.data.download import cache_directory, fetch, sha256_of
from udddm.errors import ConfigError, DataError
from udddm.files import expanded
from udddm.log import log

_GIVEN = re.compile(r"(.+?)(?:#sha256=([0-9A-Fa-f]{64}))?")


@dataclass(frozen=True)
class Published:
    """A published file of weights."""

    network: str
    """The name of the feature network, such as inception. `evaluate.<network>_weights` names another file."""
    url: str
    sha256: str
    files: tuple[str, ...]
    """Names under which other programs keep the same file. The first is used for downloads."""


INCEPTION = Published(
    "inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    # Computed from the file by several independent projects. Its first eight digits are part of the file's name.
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
)
"""torch-fidelity's conversion of the TensorFlow graph of FID's authors, which pytorch-fid publishes too."""
DINOV2 = Published(
    "dinov2",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    # Computed from the file by several independent projects; its publisher names none.
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ("dinov2_vitl14_pretrain.pth",),
)
"""DINOv2 ViT-L/14 without registers, which FD-DINOv2 is defined with."""


def directory() -> Path:
    """The directory for downloaded weights: `weights` in the cache directory."""
    return cache_directory() / "weights"


def locate(published: Published, given: str | None = None) -> tuple[Path, str]:
    """The path of a file of weights and its SHA-256, after a download if necessary.

    Args:
        published: the published file. It is searched for in `directory()` and in torch.hub's directory, where
            torch-fidelity, torchmetrics, pytorch-fid and torch.hub put it, and otherwise downloaded.
        given: another place of it, a path or an http(s) URL. With `#sha256=HEX` at its end, it is another file, with
            that checksum.

    Raises ConfigError, which names the file and what to do, if it does not exist, cannot be downloaded or has another
    checksum.
    """
    if given is None:
        return _published(published), published.sha256
    match = _GIVEN.fullmatch(given)
    place, wanted = (match[1], (match[2] or published.sha256).lower()) if match else (given, published.sha256)
    if "#" in place:
        raise ConfigError(f"{_key(published)} {given}: write FILE#sha256=HEX, with 64 hexadecimal digits")
    if place.startswith(("http://", "https://")):
        name = Path(urlsplit(place).path).name or published.files[0]
        return _download(place, directory() / f"{wanted[:8]}-{name}", wanted, published), wanted
    path = expanded(place.removeprefix("file://"))
    if not path.is_file():
        raise ConfigError(f"{_key(published)}: {path} does not exist. {_offline(published)}")
    if (found := _sha256(path)) != wanted:
        what = "the published weights have" if wanted == published.sha256 else "you gave"
        raise ConfigError(
            f"{_key(published)}: {path} has the SHA-256 {found}, and {what} {wanted}. Copy the file again, or, if "
            f"these other weights are meant, write {place}#sha256={found}"
        )
    return path, wanted


def _key(published: Published) -> str:
    return f"{published.network}_weights"


def _offline(published: Published) -> str:
    """What to do on a machine without access to the published file."""
    return (
        f"On a machine without internet access, download {published.url} elsewhere and put it at "
        f"{directory() / published.files[0]}, or name it with --{published.network}-weights FILE "
        f"(evaluate.{_key(published)} during training)"
    )


def _published(published: Published) -> Path:
    for place in (directory(), Path(torch.hub.get_dir()) / "checkpoints"):
        for name in published.files:
            if (path := place / name).is_file():
                if _sha256(path) == published.sha256:
                    return path
                log.warning(f"{path} is not used, because its SHA-256 is not that of the published weights")
    return _download(published.url, directory() / published.files[0], published.sha256, published)


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ConfigError(f"cannot read the weights {path}: {error}") from error


def _download(url: str, destination: Path, sha256: str, published: Published) -> Path:
    log.info(f"downloading the weights of {published.network} from {url}")
    try:
        return fetch(url, destination, sha256, manually="download it elsewhere")
    except DataError as error:
        raise ConfigError(
            f"the feature network {published.network} needs its weights: {error}. {_offline(published)}"
        ) from error


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file of weights, by name. Raises ConfigError if it has anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # damaged files fail in many ways: UnpicklingError, RuntimeError, EOFError, BadZipFile ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"cannot read {path} as weights: {reason}. Nothing in it was executed") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ConfigError(f"{path} is not a state dict: expected a mapping from names to tensors")
    return {str(name): value for name, value in found.items()}


def fill(network: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    """Give `network` the tensors of the file `path`. Returns it in evaluation mode, without gradients.

    Counts of batches, which batch normalization keeps during training, are ignored. Raises ConfigError if a tensor is
    missing, unknown, of another shape or not finite.
    """
    own = network.state_dict()
    given = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    for name in sorted(shapes.keys() | given.keys()):
        if name not in given or name not in shapes or tuple(given[name].shape) != shapes[name]:
            has = list(given[name].shape) if name in given else "missing"
            wants = list(shapes[name]) if name in shapes else "no such tensor"
            raise ConfigError(f"{path} has weights of another network: {name} is {has}, expected {wants}")
        if not given[name].isfinite().all():
            raise ConfigError(f"{path}: {name} has values that are not finite")
    # Names were compared above; batch normalization adds counts of batches, which the network does not have.
    network.load_state_dict({name: value.float() for name, value in given.items()}, strict=False, assign=True)
    return network.eval().requires_grad_(False)
