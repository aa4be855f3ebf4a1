"""Weights that other projects trained, for `train.init_from`: EDM's snapshots and diffusers' DiT."""

from __future__ import annotations

from pathlib import Path

from udddm.config import RunConfig
from udddm.errors import CheckpointError
from udddm.runs.conversion import diffusers, edm
from udddm.runs.conversion.converted import Converted
from udddm.storage import local_path

__all__ = ["Converted", "convert"]


def convert(where: str | Path, config: RunConfig, shape: tuple[int, int, int]) -> Converted | None:
    """The weights of another project's file or folder, for the network of a run on images of `shape` (C, H, W).

    None for anything else: a run, a checkpoint or a release. Raises CheckpointError and ConfigError.
    """
    local = local_path(where)
    if local is None:
        if str(where).endswith(".pkl"):
            raise CheckpointError(f"train.init_from={where}: download the file first; snapshots are read from a disk")
        return None
    if local.is_file():
        return edm.convert(local, config, shape)
    return diffusers.convert(local, config, shape) if diffusers.is_model(local) else None
