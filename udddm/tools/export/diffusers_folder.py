"""A folder that `diffusers.DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` loads.

model_index.json                              the pipeline and its components
pipeline.py                                   imports the pipeline from udddm, which must be installed
generator/config.json                         the configuration and the shape of an image
generator/diffusion_pytorch_model.safetensors the weights
README.md                                     the model card
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from udddm.config.plugins import NETWORKS, SCHEDULES
from udddm.errors import ConfigError
from udddm.files import write_text
from udddm.runs.model import Model
from udddm.runs.release import shareable
from udddm.tools.export import samples
from udddm.tools.export.card import card

if TYPE_CHECKING:
    from udddm.tools.export import Options, Source

PIPELINE = '''"""The pipeline of this model. Needs udddm: pip install 'udddm[diffusers]'"""

from udddm.tools.export.diffusers_pipeline import UdddmPipeline as _UdddmPipeline


class UdddmPipeline(_UdddmPipeline):
    """Generates images with one network evaluation each: pipe(batch_size=16).images"""
'''
"""The file pipeline.py. diffusers looks for a class that the file defines."""


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Write the folder. Raises ConfigError if diffusers is missing or the model has a custom network or schedule, and
    OSError."""
    del options
    model = source.model
    _check(model)
    try:
        from udddm.tools.export.diffusers_pipeline import GeneratorModel, UdddmPipeline
    except ImportError as error:
        raise ConfigError(f"--to diffusers needs diffusers ({error}): pip install 'udddm[diffusers]'") from error
    generator = GeneratorModel(shareable(model.config), list(model.shape))
    generator.network.load_state_dict(model.network.state_dict())
    UdddmPipeline(generator).save_pretrained(folder, safe_serialization=True)
    _name_pipeline(folder)
    write_text(folder / "pipeline.py", PIPELINE)
    samples.save(source, folder, arrays=False)
    write_text(folder / "README.md", card(source, diffusers=True))
    return ["load it with diffusers.DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)"]


def _check(model: Model) -> None:
    """Raise ConfigError for a network or schedule that loading the folder would import by the name in its config."""
    config = model.config
    for key, name, registry in (
        ("network.name", config.network.name, NETWORKS),
        ("schedule.kind", config.schedule.kind, SCHEDULES),
    ):
        if registry.is_import(name):
            raise ConfigError(
                f"{key}={name}: a diffusers folder holds built-in networks and schedules only, because loading it must "
                "not import code that its configuration names; export it with --to safetensors"
            )


def _name_pipeline(folder: Path) -> None:
    """Make model_index.json name the class in pipeline.py."""
    import json

    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"] = ["pipeline", "UdddmPipeline"]
    write_text(path, json.dumps(index, indent=2) + "\n")
