"""Weights, EMAs and moments in files that any engine can load with any number of ranks.

    model.safetensors                                    one rank
    model-00001-of-00004.safetensors ...                 four ranks: unsharded tensors, each in exactly one file
    ema-<name>..., optimizer...                          likewise: `exp_avg/<name>`, `exp_avg_sq/<name>`, `step`

Each rank gathers and writes its share of the parameters one at a time, and reads them one at a time, so that no rank
holds all of a large network. Tensors are unsharded, so that a file is usable without knowing how it was trained.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from udddm.backends.engines.base import MOMENTS, Engine, Pieces
from udddm.ema import Average
from udddm.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
"""The types of weights, as safetensors names them."""


def share_out(shapes: Mapping[str, torch.Size], world: int) -> dict[str, int]:
    """Assign each parameter to the rank that writes it: the largest first, each to the rank with the least so far."""
    loads = [0] * world
    owners = {}
    for name in sorted(shapes, key=lambda n: (-shapes[n].numel(), n)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += shapes[name].numel()
    return owners


def file_name(kind: str, rank: int, world: int) -> str:
    return f"{kind}.safetensors" if world == 1 else f"{kind}-{rank + 1:05d}-of-{world:05d}.safetensors"


def save(directory: Path, engine: Engine, emas: Sequence[Average]) -> None:
    """Write this rank's share of weights, EMAs and moments. Every rank must call it."""
    rank, world = engine.ranks.rank, engine.ranks.world_size
    owners = share_out(engine.shapes, world)

    def gathered(pieces: Pieces, prefix: str = "") -> dict[str, torch.Tensor]:
        found = {}
        for name, owner in owners.items():
            whole = engine.whole(pieces, name, owner)
            if whole is not None:
                found[prefix + name] = whole
        return found

    def write(kind: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file_name(kind, rank, world))

    write("model", gathered(engine.weights()))
    for ema in emas:
        write(f"ema-{ema.name}", gathered(ema.weights))
    moments = engine.moments()
    optimizer = {k: v for key in MOMENTS for k, v in gathered(moments[key], f"{key}/").items()}
    if rank == 0:
        optimizer |= engine.scalars()
    write("optimizer", optimizer)


@torch.no_grad()
def not_finite(engine: Engine, emas: Sequence[Average]) -> torch.Tensor:
    """A scalar on the training device: 0, or NaN if this rank's part of the weights, moments or EMAs has a value that
    is not finite. Does not synchronize."""
    sets = [engine.weights(), *engine.moments().values(), *(ema.weights for ema in emas)]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in (tensor for pieces in sets for tensor in pieces.values() if tensor.numel()):
        by_device.setdefault(tensor.device, []).append(tensor)
    found = torch.zeros((), device=engine.ranks.device)
    for tensors in by_device.values():
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(tensors, math.inf)])
        found += (largest * 0).sum().to(found.device)
    return found


class Saved(Mapping[str, torch.Tensor]):
    """The tensors of one kind in a checkpoint, read on access. Raises CheckpointError, which names the file."""

    def __init__(self, directory: Path, kind: str):
        single = directory / f"{kind}.safetensors"
        files = [single] if single.exists() else sorted(directory.glob(f"{kind}-?????-of-?????.safetensors"))
        if not files:
            raise CheckpointError(f"{single} does not exist")
        self.path = files[0]
        wanted = 1 if single.exists() else int(files[0].stem[-5:])
        if len(files) != wanted:
            raise CheckpointError(f"{directory} has {len(files)} of {wanted} files {kind}-*.safetensors")
        self._files: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {path}: {error}") from error

    @classmethod
    def average(cls, directory: Path, names: Sequence[str], chosen: float | str | None) -> Saved:
        """The EMA named `chosen` among `names`. None: the first EMA, or the raw weights if there are no EMAs; "none":
        the raw weights. Raises CheckpointError."""
        known = [*names, "none"]
        name = known[0] if chosen is None else str(chosen)
        if name not in known:
            with contextlib.suppress(ValueError):  # treats 0.99990 as 0.9999
                name = f"{float(name):g}"
        if name not in known:
            raise CheckpointError(f"{directory} has no EMA {name}; it has {', '.join(known)}")
        return cls(directory, "model" if name == "none" else f"ema-{name}")

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                value: torch.Tensor = file.get_tensor(name)
                return value
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {name} in {path}: {error}") from error

    def shape(self, name: str) -> torch.Size:
        """Raises CheckpointError if the tensor is missing, unreadable or not a tensor of floats."""
        path = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                found = file.get_slice(name)
                kind, shape = found.get_dtype(), torch.Size(found.get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {name} in {path}: {error}") from error
        if kind not in FLOATS:
            raise CheckpointError(f"{name} in {path} has type {kind}; weights have one of {', '.join(FLOATS)}")
        return shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def check_network(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises CheckpointError if these are the weights of a different network."""
        for name in sorted(set(self) ^ set(shapes)):
            raise CheckpointError(
                f"{self.path} belongs to a different network: it {'has' if name in self else 'lacks'} {name}"
            )
        for name, shape in shapes.items():
            found = self.shape(name)
            if found != shape:
                raise CheckpointError(
                    f"{self.path} belongs to a different network: {name} is {list(found)}, "
                    f"this network's is {list(shape)}"
                )


def load(directory: Path, engine: Engine, emas: Sequence[Average]) -> None:
    """Load a checkpoint, whichever engine and number of ranks wrote it. Raises CheckpointError."""
    weights = Saved(directory, "model")
    weights.check_network(engine.shapes)
    engine.load(weights, Saved(directory, "optimizer"))
    for ema in emas:
        saved = Saved(directory, f"ema-{ema.name}")
        for name in engine.shapes:
            engine.fill(ema.weights, name, saved[name])


def digest(engine: Engine, sets: Mapping[str, Pieces]) -> str:
    """SHA-256 of the unsharded tensors' names and bytes, in order of name; "" except on rank 0. Every rank must call
    it."""
    found = hashlib.sha256()
    for prefix, pieces in sorted(sets.items()):
        for name in sorted(engine.shapes):
            whole = engine.whole(pieces, name, 0)
            if whole is not None:
                found.update((prefix + name).encode() + whole.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest() if engine.ranks.is_rank_zero else ""
