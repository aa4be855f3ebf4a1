"""A release: the weights of one average and the configuration, without the training state and without paths.

    config.json                the configuration and the shape of an image, as in a checkpoint
    ema-<name>.safetensors     the average of the weights (model.safetensors: the raw weights)

`load_model` and every command that takes a run read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from udddm.config import RunConfig
from udddm.files import write_json
from udddm.runs.model import Model


def write_weights(model: Model, average: str, folder: Path) -> None:
    """Write a release of a model to an existing directory. `average` is the name of its weights: a decay,
    power-<length>, or "none" for the raw weights. Raises OSError."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.network.named_parameters()}
    path = folder / ("model.safetensors" if average == "none" else f"ema-{average}.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors gives 0600, but a release is for others
    tree = shareable(model.config)
    length = average.removeprefix("power-")
    tree["train"]["ema"] = [] if average == "none" or length != average else [float(average)]
    tree["train"]["power_ema"] = [float(length)] if length != average else []
    write_json(folder / "config.json", {"config": tree, "shape": list(model.shape)})


def shareable(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON without the settings that say where things are on the machine of the run: paths, URLs,
    and the arguments of a data set and of a store."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["data"] |= {"path": None, "arguments": {}}
    tree["data"]["condition"] |= {"path": None}
    tree["store"] |= {"url": None, "settings": {}}
    tree["train"] |= {"init_from": None}
    names = [Path(name).name for name in config.evaluate.features]
    tree["evaluate"] |= {"features": names, "inception_weights": None, "dinov2_weights": None, "reference": None}
    tree["loggers"] = None
    return tree
