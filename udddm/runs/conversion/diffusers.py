"""Weights of a model folder of diffusers: `DiTTransformer2DModel` for `network.name=dit`, `UNet2DModel` for `ddpmpp`.

A folder has a config.json, whose `_class_name` names the class, and diffusion_pytorch_model.safetensors, in one or more
files. diffusers itself is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path

from udddm.config import RunConfig
from udddm.errors import CheckpointError
from udddm.files import load_json
from udddm.runs.conversion import diffusers_dit, diffusers_unet
from udddm.runs.conversion.converted import Converted, Source, check_settings
from udddm.runs.weights import Saved

FILES = "diffusion_pytorch_model"
CLASSES = {"DiTTransformer2DModel": diffusers_dit, "UNet2DModel": diffusers_unet}


def is_model(folder: Path) -> bool:
    """Whether a folder is a model or a pipeline of diffusers."""
    if (folder / "model_index.json").exists():
        return True
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "_class_name" in found


def convert(folder: Path, config: RunConfig, shape: tuple[int, int, int]) -> Converted:
    """The weights of a model folder for the network of a run on images of `shape` (C, H, W).

    Raises CheckpointError for a class or an architecture that no network of the package has and for a damaged folder,
    and ConfigError for a run whose network or preconditioning differs from that of the folder.
    """
    if not (folder / "config.json").exists():
        inner = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), "transformer")
        raise CheckpointError(f"{folder} is a pipeline of diffusers; name the folder of its network, {folder / inner}")
    described = load_json(folder / "config.json", "_class_name")
    kind = described["_class_name"]
    reader = CLASSES.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise CheckpointError(
            f"{folder} holds diffusers' {str(kind)[:80]}, which no network of this package equals; "
            f"{' and '.join(CLASSES)} can be read"
        )
    source = Source(folder, described)
    for key, (value, default) in reader.FIXED.items():
        source.require(key, value, default)
    check_settings(str(folder), reader.wanted(source, config, shape))
    saved = _open(folder)
    for name in saved:
        saved.shape(name)  # raises an error for a tensor that is damaged or not of floats
    return Converted(str(folder), dict(reader.tensors(saved, config, shape)))


def _open(folder: Path) -> Saved:
    if not list(folder.glob(f"{FILES}*.safetensors")) and list(folder.glob(f"{FILES}*.bin")):
        raise CheckpointError(
            f"{folder} holds a pickle, {FILES}.bin, which is not read; save the model with safe_serialization=True"
        )
    return Saved(folder, FILES)
