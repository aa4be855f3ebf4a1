"""The files of `udddm sample`, and a film of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from udddm.errors import ConfigError
from udddm.files import atomic_save, atomic_write, write_array
from udddm.image_grid import COLOR_TYPES, encode, save_image_grid, to_uint8
from udddm.runs.run import Run

SHOWN = 400
"""Images in a grid."""


def save(
    directory: Path,
    images: npt.NDArray[np.float32],
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    kinds: Sequence[str],
    columns: int | None = None,
) -> list[str]:
    """Write images [N, C, H, W] in [-1, 1] to a directory, and return what was written, in words.

    `kinds`: "npy" (samples.npy, float32 [N, C, H, W]), "npz" (samples.npz as of ADM: uint8 `arr_0` [N, H, W, C], and
    `arr_1` [N] int64 if there are `labels`), "png" (`<seed>.png` for each image) and "grid" (samples.png, the first
    `SHOWN` images, in `columns`). Raises ConfigError for images that no PNG holds, and OSError.
    """
    found, channels = [], images.shape[1]
    if "png" in kinds and channels not in COLOR_TYPES:
        raise ConfigError(f"images of {channels} channels are no PNG files: use --save npy or npz")
    directory.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(torch.from_numpy(images)) if {"png", "npz"} & set(kinds) else np.empty(0, np.uint8)
    if "npy" in kinds:
        write_array(directory / "samples.npy", images)
        found.append(str(directory / "samples.npy"))
    if "npz" in kinds:
        arrays = {"arr_0": pixels} | ({} if labels is None else {"arr_1": np.asarray(labels, np.int64)})
        atomic_write(directory / "samples.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        found.append(str(directory / "samples.npz"))
    if "png" in kinds:
        digits = max(6, len(str(max(seeds))))
        for seed, image in zip(seeds, pixels, strict=True):
            atomic_write(directory / f"{seed:0{digits}d}.png", lambda file, image=image: file.write(encode(image)))  # type: ignore[misc]
        found.append(f"{len(images)} PNG files in {directory}")
    if "grid" in kinds:
        save_image_grid(torch.from_numpy(images[:SHOWN]), directory / "samples.png", columns=columns)
        which = "" if len(images) <= SHOWN else f"the first {SHOWN} in "
        found.append(f"{which}{directory / 'samples.png'}")
    return found


def film(run: Run, out: Path, seconds: float = 8.0) -> int:
    """Write the grids of samples that a run drew during training to `out`, an animated GIF of about `seconds`.

    Returns the number of pictures. Raises ConfigError if the run has none, or Pillow is not installed, StoreError and
    OSError.
    """
    files = sorted(run.pictures().glob("step-*.png"))
    if not files:
        raise ConfigError(f"{run} has no pictures of training in samples/ (sample.every_steps)")
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("a GIF needs Pillow: pip install 'udddm[images]'") from None
    frames = []
    for file in files:
        with Image.open(file) as picture:
            frames.append(picture.convert("P", palette=Image.Palette.ADAPTIVE))
    each = round(max(40, min(1000, 1000 * seconds / len(frames))))
    times = [each] * (len(frames) - 1) + [2000]  # the last one stays

    def write(temporary: Path) -> None:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)

    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_save(out, write)
    return len(frames)
