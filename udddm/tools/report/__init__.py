"""`udddm report`: one HTML page about a run, or about several side by side, that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from udddm.files import write_text
from udddm.tools.report.page import document, page
from udddm.tools.report.values import collect, grid_size, recorded

__all__ = ["collect", "document", "grid_size", "page", "recorded", "write"]


def write(
    runs: Sequence[str | Path], out: Path, *, images: bool = True, device: str = "auto", trust: bool = False
) -> None:
    """Write the page of `runs`, which are directories or URLs, to the file `out`.

    `images`: also load the newest checkpoint, and draw samples with it. `trust`: allow the configuration of a
    checkpoint to import code, as `load_model` does.

    Raises ConfigError for a run that does not exist, CheckpointError, StoreError, and OSError.
    """
    found = [collect(run, images=images, device=device, trust=trust) for run in runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(found))
