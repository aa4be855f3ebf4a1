"""The model card of a release, README.md: YAML for the Hugging Face Hub, then what was trained, scored, and how to use
it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from udddm.config import as_yaml
from udddm.diffusion.conditions import ConditionImages
from udddm.runs.release import shareable
from udddm.tools.export import samples

if TYPE_CHECKING:
    from udddm.tools.export import Source

METRICS = {"fid": "FID", "fd": "Frechet distance", "kid": "KID", "precision": "precision", "recall": "recall"}
SECTIONS = ("data", "schedule", "network", "objective", "train")
"""The sections of the configuration that affect the weights."""


TAKEN = {
    "downscale": "of which it draws an enlargement",
    "mask": "of which it draws a hidden part",
    "gray": "to which it gives color",
    "pairs": "from which it draws another",
}
"""What a model does with its conditioning image, by `data.condition.kind`."""


def card(source: Source, *, diffusers: bool = False) -> str:
    """The text of README.md of a release, or of a `diffusers` folder."""
    front = {
        "library_name": "diffusers" if diffusers else "udddm",
        "pipeline_tag": "unconditional-image-generation" if source.model.conditions is None else "image-to-image",
        "tags": ["image-generation", "diffusion", "one-step", source.model.config.objective.name],
    }
    parts = [
        f"---\n{as_yaml(front, flow=False).strip()}\n---",
        f"# {_line(source.facts.name)}",
        _introduction(source),
        _grid(source),
        _diffusers_usage(source) if diffusers else _usage(source),
        _training(source),
        _scores(source),
        _settings(source),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(text: str) -> str:
    """Text on one line, without the characters that Markdown and HTML interpret."""
    return "".join(c for c in " ".join(text.split()) if c not in "<>[]()`*|#!\\")


def _grid(source: Source) -> str:
    if not samples.shows_grid(source):
        return ""
    if source.examples is None:
        return f"![Samples](grid.png)\n\n*Images from one network evaluation each{_of_classes(source)}.*"
    return (
        "![Conditioning images, samples and real images](grid.png)\n\n*From the top: conditioning images, what the "
        "model draws from them with one network evaluation each, and the images that they belong to. They are images "
        "of the training data.*"
    )


def _of_classes(source: Source) -> str:
    classes = source.model.config.network.classes
    return ", one class per column" if 2 <= classes <= 20 else ""


def _introduction(source: Source) -> str:
    model = source.model
    channels, height, width = model.shape
    count = sum(p.numel() for p in model.network.parameters())
    classes = model.config.network.classes
    kind = f"conditioned on {classes} classes" if classes else "unconditional"
    if model.conditions is not None:
        kind += f" and takes an image, {TAKEN[model.config.data.condition.kind]}"
    average = f"EMA {source.average} of the weights" if source.average != "none" else "weights without averaging"
    return (
        f"An image generator that needs one network evaluation per image, trained with udddm (arXiv 2405.21059). It is "
        f"{kind}, has {count:,} parameters ({average}, float32), and generates images [{channels}, {height}, {width}] "
        "(channels, height, width) with values in [-1, 1]."
    )


def _conditional_usage(source: Source, conditions: ConditionImages) -> str:
    channels, height, width = conditions.given_shape
    hidden = ", NaN in the hidden part" if conditions.hides else ""
    mask = f" --mask {width // 4},{height // 4},{width // 2},{height // 2}" if conditions.hides else ""
    imports = "" if source.examples is None else "import numpy\n"
    load = "..." if source.examples is None else f'numpy.load("FOLDER/{samples.CONDITIONS}")'
    return (
        "## Usage\n\n"
        "`FOLDER` is this folder, or `hf://user/model` once it is on the Hugging Face Hub "
        "(`pip install 'udddm[hub]'`).\n\n"
        f"```python\n{imports}import udddm\n\n"
        'model = udddm.load_model("FOLDER")\n'
        f"conditions = {load}  # [N, {channels}, {height}, {width}]: uint8, or floats in [-1, 1]{hidden}\n"
        "images = model.sample(range(len(conditions)), conditions=conditions)\n"
        "```\n\n"
        f"```\nudddm sample FOLDER --condition image.png{mask}  # {width}x{height} pixels\n```"
    )


def _usage(source: Source) -> str:
    if source.model.conditions is not None:
        return _conditional_usage(source, source.model.conditions)
    each = "its seed and label" if source.model.config.network.classes else "its seed"
    return (
        "## Usage\n\n"
        "`FOLDER` is this folder, or `hf://user/model` once it is on the Hugging Face Hub "
        "(`pip install 'udddm[hub]'`).\n\n"
        "```python\nimport udddm\n\n"
        'model = udddm.load_model("FOLDER")\n'
        f"images = model.sample(range(64))  # float32 in [-1, 1]; each image depends only on {each}\n"
        "```\n\n"
        "```\nudddm sample FOLDER --count 100 --nfe 2\n```"
    )


def _diffusers_usage(source: Source) -> str:
    conditions = source.model.conditions
    given = "seeds=range(16)"
    if conditions is not None:
        given = "image=image, mask_image=mask" if conditions.hides else "image=image"
    return (
        "## Usage\n\n"
        "`pip install 'udddm[diffusers]'`. `FOLDER` is this folder, or `user/model` once it is on the Hugging Face Hub."
        "\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)\n'
        f"images = pipe({given}).images\n"
        "```"
    )


def _training(source: Source) -> str:
    config = source.model.config
    rows = source.facts.rows or [("data", _line(config.data.name)), ("objective", _line(config.objective.name))]
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(
        f"| {_line(what)} | {_line(value)} |" for what, value in rows
    )


def _scores(source: Source) -> str:
    rows = source.facts.scores
    first = [*source.model.config.train.averages, "none"][0]
    names = [name for name in METRICS if any(name in row for row in rows)]
    if not names:
        return ""
    features = shareable(source.model.config)["evaluate"]["features"]
    of = "" if source.average == first else f" of another average of this run (EMA {first}, not {source.average})"
    lines = [f"| {row['evaluations']} | " + " | ".join(_number(row.get(n)) for n in names) + " |" for row in rows]
    return (
        f"## Scores\n\nScores{of} after {rows[-1]['images']:,.0f} images, on the features `{_line(str(features))}`.\n\n"
        f"| evaluations | {' | '.join(METRICS[n] for n in names)} |\n|{'---|' * (len(names) + 1)}\n" + "\n".join(lines)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _settings(source: Source) -> str:
    tree = shareable(source.model.config)
    text = as_yaml({name: tree[name] for name in SECTIONS}, flow=False).replace("```", "'''")
    return f"## Settings\n\n```yaml\n{text.strip()}\n```"
