"""A release (`udddm.runs.release`) with samples, a grid and a model card:

    samples.npy, grid.png        images from one evaluation each
    conditions.npy               of a model with `data.condition`, what they were drawn from
    README.md                    the model card

The same folder is what the Hugging Face Hub stores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from udddm.files import write_text
from udddm.runs.release import write_weights
from udddm.tools.export import samples
from udddm.tools.export.card import card

if TYPE_CHECKING:
    from udddm.tools.export import Options, Source


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Write a release of `source` to `folder`. Raises OSError."""
    del options
    model = source.model
    write_weights(model, source.average, folder)
    count = samples.save(source, folder, arrays=True)
    write_text(folder / "README.md", card(source))
    name = f"EMA {source.average}" if source.average != "none" else "raw weights"
    return [f"the {name}, {count} samples, and README.md; udddm sample takes this folder"]
