"""A custom data set: any object with a length whose items are images, or (image, label) pairs.

    PYTHONPATH=examples udddm-train --config digits \\
        --set data.name=own_images:factory --set 'data.arguments={count: 2000, side: 8}'

From Python, pass the object itself, or the function that returns it, which every worker then calls:

    udddm.train("digits", own_images.factory, run_dir="runs/shapes")

An item must depend only on its index, because the store keeps a state per sample from epoch to epoch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from udddm.errors import DataError

CLASSES = ["disk", "square", "cross"]


class Shapes:
    """`count` gray images [1, side, side] in [-1, 1], each a disk, square or cross at a random place and size."""

    classes = CLASSES
    """The number of classes, or their names, which is compared with network.classes."""

    def __init__(self, count: int, side: int):
        if count < 1 or side < 4:
            raise DataError(f"data.arguments: count {count} must be at least 1, and side {side} at least 4")
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], int]:
        """Returns image and label. Raises IndexError beyond the end, like a list."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.default_rng(index)
        label = index % len(CLASSES)
        radius = random.uniform(self.side / 6, self.side / 3)
        center = random.uniform(radius, self.side - radius, size=2)
        places = np.arange(self.side) + 0.5
        across, down = np.abs(places[None, :] - center[0]), np.abs(places[:, None] - center[1])
        if label == 0:
            distance = np.hypot(across, down)
        elif label == 1:
            distance = np.maximum(across, down)
        else:
            distance = np.maximum(np.minimum(across, down) * 3, np.maximum(across, down))
        image = np.clip(2 * (radius - distance), -1, 1)  # a soft edge, one pixel wide
        return image[None].astype(np.float32), label


def factory(count: int = 2000, side: int = 8) -> Shapes:
    """The factory that `data.name=own_images:factory` calls with `data.arguments`."""
    return Shapes(count, side)
