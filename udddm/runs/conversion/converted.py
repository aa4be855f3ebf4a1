"""Weights of another project's file under the names of this package's networks, and the settings that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from udddm.config import RunConfig
from udddm.errors import CheckpointError, ConfigError
from udddm.runs.weights import Saved

Read = Callable[[], torch.Tensor]


class Converted(Mapping[str, torch.Tensor]):
    """Tensors by their names in this package, converted on access. Raises CheckpointError, which names the file."""

    def __init__(self, where: str, tensors: Mapping[str, Read]):
        self.where, self._tensors = where, dict(tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._tensors[name]()
        if not found.isfinite().all():
            raise CheckpointError(f"{self.where}: the weights of {name} are not all finite; use another file")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def check_network(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises CheckpointError if these are the weights of a different network."""
        for name in sorted(set(self) ^ set(shapes)):
            raise CheckpointError(
                f"{self.where} belongs to a different network: it {'has' if name in self else 'lacks'} {name}"
            )
        for name, shape in shapes.items():
            found = self._tensors[name]()
            if not found.is_floating_point() or found.shape != shape:
                raise CheckpointError(
                    f"{self.where} belongs to a different network: {name} is {list(found.shape)} of type "
                    f"{found.dtype}, this network's is {list(shape)}"
                )


def check_settings(where: str, wanted: Mapping[str, tuple[Any, Any]]) -> None:
    """Compare the settings that a file needs with those of the run: (wanted, found) by key.

    Raises ConfigError, which says what to set.
    """
    wrong = {key: pair for key, pair in wanted.items() if pair[0] != pair[1]}
    if wrong:
        found = ", ".join(f"{key} is {_text(value)}" for key, (_, value) in wrong.items())
        needed = " ".join(f"{key}={_text(value)}" for key, (value, _) in wrong.items())
        raise ConfigError(f"train.init_from={where} needs {needed}; {found}")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


@dataclass(frozen=True)
class Source:
    """The description of a model in a config.json. Methods raise CheckpointError, which names the folder."""

    folder: Path
    described: Mapping[str, Any]

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.folder} cannot be expressed by a network of this package: {why}")

    def require(self, key: str, value: Any, default: Any) -> None:
        """Refuse a model whose `key` is not `value`. `default` is what diffusers assumes if it is missing."""
        if (found := self.described.get(key, default)) != value:
            self.refuse(f"its {key} is {str(found)[:40]}, not {value}")

    def count(self, key: str, default: int) -> int:
        """A whole number above 0."""
        found = self.described.get(key, default)
        if type(found) is not int or not 0 < found < 1 << 24:
            self.refuse(f"its {key} is not a whole number above 0")
        return found

    def counts(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """Whole numbers above 0."""
        found = self.described.get(key, default)
        if not isinstance(found, (list, tuple)) or not all(type(each) is int and 0 < each < 1 << 24 for each in found):
            self.refuse(f"its {key} is not a list of whole numbers above 0")
        return tuple(found)

    def texts(self, key: str, default: Sequence[str]) -> tuple[str, ...]:
        found = self.described.get(key, default)
        if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
            self.refuse(f"its {key} is not a list of names")
        return tuple(each[:80] for each in found)


def epsilon(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """(wanted, found) of the settings with which f is the estimate of a network that predicts the noise, as DDPM does,
    with 1,000 steps."""
    return {
        "network.condition": ("none", config.network.condition),
        "network.max_frequency": (1.0, config.network.max_frequency or 1.0),
        "schedule.kind": ("vp", config.schedule.kind),
        "schedule.timesteps": (1000, config.schedule.timesteps),
        "schedule.preconditioning": ("epsilon", config.schedule.preconditioning),
    }


def tensor_of(saved: Saved, name: str) -> torch.Tensor:
    """Raises CheckpointError if there is no tensor of that name."""
    if name not in saved:
        raise CheckpointError(f"{saved.path} belongs to a different network: it lacks {name}")
    return saved[name]


def joined(get: Callable[[str], torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Tensors, one below the other."""
    parts = [get(name) for name in names]
    if len({part.shape[1:] for part in parts}) > 1:
        return parts[0]  # its shape is reported as wrong
    return torch.cat(parts)
