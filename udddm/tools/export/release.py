"""A release: the weights of one average as safetensors, the configuration, samples and a model card.

    config.json                  the configuration and the shape of an image, as in a checkpoint
    ema-<name>.safetensors       the average of the weights (model.safetensors: the raw weights)
    samples.npy, grid.png        images from one evaluation each
    README.md                    the model card

Every command that takes a run takes a release. The same folder is what the Hugging Face Hub stores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from udddm.files import write_array, write_json, write_text
from udddm.image_grid import save_image_grid
from udddm.runs.model import Model
from udddm.tools.export.card import card
from udddm.tools.export.facts import shareable
from udddm.tools.report import grid_size

if TYPE_CHECKING:
    from udddm.tools.export import Options, Source


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Write a release of `source` to `folder`. Raises OSError."""
    del options
    model = source.model
    write_weights(model, source.average, folder)
    count, columns = grid_size(model)
    images = model.sample(range(count))
    write_array(folder / "samples.npy", images)
    save_image_grid(torch.from_numpy(images), folder / "grid.png", columns=columns)
    write_text(folder / "README.md", card(source))
    name = f"EMA {source.average}" if source.average != "none" else "raw weights"
    return [f"the {name}, {count} samples, and README.md; udddm sample takes this folder"]


def write_weights(model: Model, average: str, folder: Path) -> None:
    """Write the weights of a model in the format of a checkpoint, with the configuration, which names only this average
    and no path. Raises OSError."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.network.named_parameters()}
    kind = "model" if average == "none" else f"ema-{average}"
    path = folder / f"{kind}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors gives 0600, but a release is for others
    write_json(folder / "config.json", {"config": _config(model, average), "shape": list(model.shape)})


def _config(model: Model, average: str) -> dict[str, Any]:
    tree = shareable(model.config)
    length = average.removeprefix("power-")
    tree["train"]["ema"] = [] if average == "none" or length != average else [float(average)]
    tree["train"]["power_ema"] = [float(length)] if length != average else []
    return tree
