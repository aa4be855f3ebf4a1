"""The images that an export shows of its model: samples, and for a model with `data.condition` what they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from udddm.files import write_array
from udddm.image_grid import save_image_grid
from udddm.tools.report import conditional, grid_size

if TYPE_CHECKING:
    from udddm.tools.export import Source

GRID, SAMPLES, CONDITIONS = "grid.png", "samples.npy", "conditions.npy"


def shows_grid(source: Source) -> bool:
    """Whether an export has a grid: not of a model with `data.condition` whose data set is not at hand."""
    return source.model.conditions is None or source.examples is not None


def save(source: Source, folder: Path, *, arrays: bool) -> int:
    """Write GRID and, with `arrays`, SAMPLES [N, C, H, W] float32 to `folder`; with `data.condition` also CONDITIONS,
    the conditioning images in the form that `Model.sample` takes, if examples are known. Returns N. Raises OSError."""
    model = source.model
    if not shows_grid(source):
        return 0
    if source.examples is None:
        count, columns = grid_size(model)
        images = shown = torch.from_numpy(model.sample(range(count)))
    else:
        images = conditional.sampled(model, source.examples)
        shown = torch.cat([source.examples.shown, images, source.examples.real])
        columns = len(images)
    if arrays:
        write_array(folder / SAMPLES, images.numpy())
    if arrays and source.examples is not None:
        write_array(folder / CONDITIONS, source.examples.given.numpy())
    save_image_grid(shown, folder / GRID, columns=columns)
    return len(images)
