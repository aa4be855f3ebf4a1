"""Weights of EDM's network snapshots, such as `edm-cifar10-32x32-cond-vp.pkl`, for `network.name=ddpmpp`.

A snapshot (github.com/NVlabs/edm, `training/training_loop.py`) is a pickle of a dict, whose `ema` is an `EDMPrecond`
around a `SongUNet`. Objects of both are pickled as calls of `torch_utils.persistence._reconstruct_persistent_obj` with
the source code of their module, which unpickling would execute, and a state. Here the pickle is only read
(`inert_pickle.py`), and the source code is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from udddm.config import RunConfig
from udddm.errors import CheckpointError
from udddm.networks.ddpmpp import DDPMppSettings
from udddm.runs.conversion import inert_pickle, tensors
from udddm.runs.conversion.converted import Converted, Read, check_settings
from udddm.runs.conversion.inert_pickle import Inert

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
MODULE_DICT = "torch.nn.modules.container.ModuleDict"
NAMES = {
    *tensors.NAMES,
    *inert_pickle.DICTS,
    PERSISTENT,
    MODULE_DICT,
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"{package}.multiarray.{name}"
        for package in ("numpy.core", "numpy._core")
        for name in ("scalar", "_reconstruct")
    ),
}
"""The names in EDM's snapshots. Only tensors and persistent objects are read further."""
LARGEST = 8 << 30
"""Bytes of the largest snapshot that is read. EDM's largest has 1.2 GB."""


@dataclass(frozen=True)
class _Module:
    """A persistent object of a snapshot: the name of its class, and its attributes."""

    kind: str
    state: dict[str, Any]
    where: str

    @classmethod
    def of(cls, record: Any, where: str) -> _Module:
        """Raises CheckpointError for a record that is not a module."""
        state: Any = None
        kind: Any = ""
        if isinstance(record, Inert) and record.name == MODULE_DICT:
            kind, state = "ModuleDict", record.state
        elif isinstance(record, Inert) and record.name == PERSISTENT:
            meta = record.arguments[0] if record.arguments else None
            if isinstance(meta, dict) and meta.get("type") == "class":
                kind, state = meta.get("class_name"), meta.get("state")
        if not isinstance(kind, str) or not isinstance(state, dict):
            raise CheckpointError(f"{where}: a part of the network is not a module")
        return cls(kind[:80], state, where)

    def _entry(self, group: str, name: str) -> Any:
        found = self.state.get(group)
        return found.get(name) if isinstance(found, dict) else None

    def children(self) -> list[tuple[str, _Module]]:
        found = self.state.get("_modules")
        entries = found.items() if isinstance(found, dict) else ()
        return [(str(name)[:80], _Module.of(record, self.where)) for name, record in entries if record is not None]

    def child(self, name: str, kind: str = "") -> _Module:
        """Raises CheckpointError if there is none, or one of another class than `kind`."""
        found = _Module.of(self._entry("_modules", name), self.where)
        if kind and found.kind != kind:
            raise CheckpointError(f"{self.where} is another network: its {name} is {found.kind}, not {kind}")
        return found

    def has(self, name: str) -> bool:
        return self._entry("_modules", name) is not None

    def parameter(self, name: str) -> torch.Tensor:
        return tensors.tensor(self._entry("_parameters", name), self.where)

    def number(self, name: str) -> float | None:
        """An attribute or construction argument that is a number."""
        found = self._argument(name)
        return found if isinstance(found, (int, float)) else None

    def whole(self, name: str) -> int | None:
        """An attribute or construction argument that is a whole number."""
        found = self._argument(name)
        return found if type(found) is int and 0 <= found < 1 << 24 else None

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """An attribute or construction argument that is a list of whole numbers."""
        found = self._argument(name)
        plain = isinstance(found, (list, tuple)) and len(found) <= 64 and all(type(each) is int for each in found)
        return tuple(found) if plain else None

    def _argument(self, name: str) -> Any:
        given = self.state.get("_init_kwargs")
        return given[name] if isinstance(given, dict) and name in given else self.state.get(name)


def convert(path: Path, config: RunConfig, shape: tuple[int, int, int]) -> Converted:
    """The averaged weights of an EDM snapshot for the network of a run on images of `shape` (C, H, W).

    Raises CheckpointError for a file that is not a snapshot of EDM's DDPM++, and ConfigError for a run whose network or
    preconditioning differs from that of the file.
    """
    where = str(path)
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{where}: refused, because it has more than {LARGEST >> 30} GiB")
        with path.open("rb") as file:
            snapshot = inert_pickle.read(file, NAMES, where)
    except OSError as error:
        raise CheckpointError(f"cannot read {where}: {error}") from error
    if not isinstance(snapshot, dict) or "ema" not in snapshot:
        raise CheckpointError(f"{where} is not a network snapshot of EDM: it has no entry ema")
    outer = _Module.of(snapshot["ema"], where)
    if outer.kind != "EDMPrecond":
        raise CheckpointError(
            f"{where} holds {outer.kind}, whose preconditioning is not EDM's; give a snapshot of an EDMPrecond"
        )
    model = outer.child("model", "SongUNet")
    check_settings(where, _wanted(outer, model, config, shape))
    return Converted(where, dict(_network(model)))


def _wanted(
    outer: _Module, model: _Module, config: RunConfig, shape: tuple[int, int, int]
) -> dict[str, tuple[Any, Any]]:
    """(wanted, found) of the settings on which f depends, by key."""
    network, schedule = config.network, config.schedule
    wanted: dict[str, tuple[Any, Any]] = {
        "network.name": ("ddpmpp", network.name),
        "network.condition": ("none", network.condition),
        "network.max_frequency": (1.0, network.max_frequency),
        "schedule.preconditioning": ("edm", schedule.preconditioning),
    }

    if network.name == "ddpmpp":
        settings = DDPMppSettings.model_validate(network.settings)
        wanted |= {
            f"network.settings.{key}": (field.default, getattr(settings, key))
            for key, field in DDPMppSettings.model_fields.items()
        }

    def compare(key: str, value: Any, found: Any) -> None:
        if value is not None:
            wanted[key] = value, found

    compare("network.classes", outer.whole("label_dim"), network.classes)
    compare("schedule.sigma_data", outer.number("sigma_data"), schedule.sigma_data)
    compare("network.base_channels", model.whole("model_channels"), network.base_channels)
    compare("network.channel_mult", model.numbers("channel_mult"), network.channel_mult)
    compare("network.blocks_per_level", model.whole("num_blocks"), network.blocks_per_level)
    side, channels = outer.whole("img_resolution"), outer.whole("img_channels")
    if side is not None and channels is not None:
        wanted["the shape of an image"] = (channels, side, side), shape
        attended = model.numbers("attn_resolutions")
        sides = {side >> stage for stage in range(len(network.channel_mult))}
        if attended is not None:
            compare(
                "network.attention_resolutions",
                tuple(sorted(sides & set(attended), reverse=True)),
                tuple(sorted(sides & set(network.attention_resolutions), reverse=True)),
            )
    return wanted


def _network(model: _Module) -> Iterator[tuple[str, Read]]:
    """The tensors of a `SongUNet`, with the names of `DDPMpp`. Its map_augment, of an input that is 0 in sampling, is
    left out."""
    if model.child("map_noise").kind != "PositionalEmbedding":
        raise CheckpointError(
            f"{model.where} is NCSN++ (embedding_type={model.child('map_noise').kind}), which this package does not "
            "have; give a snapshot of a DDPM++, as EDM's files named -vp hold"
        )
    yield from _layer("noise_in", model.child("map_layer0"))
    yield from _layer("noise_out", model.child("map_layer1"))
    if model.has("map_label"):
        yield from _layer("label", model.child("map_label"))
    encoder, decoder = model.child("enc").children(), model.child("dec").children()
    if len(encoder) < 2 or len(decoder) < 5:
        raise CheckpointError(f"{model.where} is another network: it has too few blocks")
    yield from _layer("stem", encoder[0][1])
    for index, (name, block) in enumerate(encoder[1:]):
        yield from _block(f"encoder.{index}", name, block)
    yield from _block("middle_in", *decoder[0])
    yield from _block("middle_out", *decoder[1])
    for index, (name, block) in enumerate(decoder[2:-2]):
        yield from _block(f"decoder.{index}", name, block)
    yield from _layer("norm_out", decoder[-2][1])
    yield from _layer("conv_out", decoder[-1][1])


def _block(ours: str, name: str, block: _Module) -> Iterator[tuple[str, Read]]:
    """The tensors of a `UNetBlock`."""
    if block.kind != "UNetBlock" or block.state.get("adaptive_scale") is not False:
        raise CheckpointError(f"{block.where} is another network than DDPM++: its part {name} is {block.kind}")
    pairs = {"norm0": "norm_in", "conv0": "conv_in", "affine": "embed", "norm1": "norm_out", "conv1": "conv_out"}
    for theirs, mine in (pairs | {"skip": "shortcut"}).items():
        if theirs in pairs or block.has(theirs):
            yield from _layer(f"{ours}.{mine}", block.child(theirs))
    if not block.has("qkv"):
        return
    if block.state.get("num_heads") != 1:
        raise CheckpointError(f"{block.where} is another network than DDPM++: its part {name} has several heads")
    yield from _layer(f"{ours}.attention.norm", block.child("norm2"))
    yield from _layer(f"{ours}.attention.query_key_value", block.child("qkv"), _separated)
    yield from _layer(f"{ours}.attention.out", block.child("proj"), _matrix)


def _layer(
    ours: str, layer: _Module, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Iterator[tuple[str, Read]]:
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", partial(_read, layer, name, change)


def _read(layer: _Module, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    found = layer.parameter(name)
    return found if change is None else change(found)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The weights of a 1x1 convolution as those of a linear layer; a bias as it is."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def _separated(tensor: torch.Tensor) -> torch.Tensor:
    """Rows (q0, k0, v0, q1, ...) as (q0, q1, ..., k0, ..., v0, ...)."""
    rows = _matrix(tensor)
    if len(rows) % 3:
        return rows  # its shape is reported as wrong
    return rows.view(-1, 3, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
