"""`udddm data resize`: pictures of any sizes as a data set of one size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from udddm.config import DataConfig
from udddm.data import pictures
from udddm.data.images import Array, format_shape
from udddm.errors import ConfigError
from udddm.tools.dataset.filters import FILTERS, Size
from udddm.tools.dataset.output import Work, open_sink, write_parts
from udddm.tools.dataset.source import digest_of, in_parallel, open_pictures


def resize(config: DataConfig, target: Path, size: Size, name: str, kind: str) -> str:
    """Write the pictures of a data set, resized to `size` by the filter `name`, to `target` in the format `kind`.

    Labels and names of classes are kept. Gray images are written only if all are gray. Returns a line that says what
    was written. An interrupted call is resumed by another one with the same arguments.

    Raises DataError for a damaged picture, and ConfigError for a target that exists or belongs to another command.
    """
    if config.size is not None:
        raise ConfigError("data.size does not apply: the size is that of the command")
    source = open_pictures(config)
    gray = source.is_gray()
    plan = {
        "command": "resize",
        "size": list(size),
        "filter": name,
        "format": kind,
        "samples": len(source),
        "data": digest_of(source),
        "version": 1,
    }
    work = Work(target, plan)
    if work.ended():
        return f"{target} is complete"
    shape = (1 if gray else 3, size[1], size[0])
    threads = min(8, os.cpu_count() or 1)

    def one(index: int) -> Array:
        return pictures.pixels(FILTERS[name](source.picture(index, gray=gray), size))

    with work.locked():
        sink = open_sink(work, kind, len(source), shape)
        write_parts(work, sink, len(source), lambda ids: (np.stack(list(in_parallel(one, ids.tolist(), threads))), {}))
        work.finish(sink, source.labels, source.class_names)
    return f"{len(source)} images of {format_shape(shape)} in {target}"
