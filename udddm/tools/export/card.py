"""The model card of a release, README.md: YAML for the Hugging Face Hub, then what was trained, scored, and how to use
it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from udddm.config import as_yaml
from udddm.runs.release import shareable

if TYPE_CHECKING:
    from udddm.tools.export import Source

METRICS = {"fid": "FID", "fd": "Frechet distance", "kid": "KID", "precision": "precision", "recall": "recall"}
SECTIONS = ("data", "schedule", "network", "objective", "train")
"""The sections of the configuration that affect the weights."""


def card(source: Source, *, diffusers: bool = False) -> str:
    """The text of README.md of a release, or of a `diffusers` folder."""
    front = {
        "library_name": "diffusers" if diffusers else "udddm",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["image-generation", "diffusion", "one-step", source.model.config.objective.name],
    }
    parts = [
        f"---\n{as_yaml(front, flow=False).strip()}\n---",
        f"# {_line(source.facts.name)}",
        _introduction(source),
        "![Samples](grid.png)",
        f"*Images from one network evaluation each{_of_classes(source)}.*",
        _diffusers_usage() if diffusers else _usage(source),
        _training(source),
        _scores(source),
        _settings(source),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(text: str) -> str:
    """Text on one line, without the characters that Markdown and HTML interpret."""
    return "".join(c for c in " ".join(text.split()) if c not in "<>[]()`*|#!\\")


def _of_classes(source: Source) -> str:
    classes = source.model.config.network.classes
    return ", one class per column" if 2 <= classes <= 20 else ""


def _introduction(source: Source) -> str:
    model = source.model
    channels, height, width = model.shape
    count = sum(p.numel() for p in model.network.parameters())
    classes = model.config.network.classes
    kind = f"conditioned on {classes} classes" if classes else "unconditional"
    average = f"EMA {source.average} of the weights" if source.average != "none" else "weights without averaging"
    return (
        f"An image generator that needs one network evaluation per image, trained with udddm (arXiv 2405.21059). It is "
        f"{kind}, has {count:,} parameters ({average}, float32), and generates images [{channels}, {height}, {width}] "
        "(channels, height, width) with values in [-1, 1]."
    )


def _usage(source: Source) -> str:
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


def _diffusers_usage() -> str:
    return (
        "## Usage\n\n"
        "`pip install 'udddm[diffusers]'`. `FOLDER` is this folder, or `user/model` once it is on the Hugging Face Hub."
        "\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)\n'
        "images = pipe(seeds=range(16)).images\n"
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
