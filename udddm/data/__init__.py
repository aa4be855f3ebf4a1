"""Data sets: map-style objects of images, and `ImageDataset`, through which the trainer reads them.

dataset = ImageDataset(load_dataset(config.data))   # or ImageDataset(your_own_object)
images, labels = dataset.batch(ids)                 # float32 [n, C, H, W] in [-1, 1], int64 [n] or None
"""

from udddm.data.dataset import ImageDataset, check_agreement, check_unchanged
from udddm.data.images import ArrayImages, BatchSource, MapDataset
from udddm.data.loading import expected, load_dataset

__all__ = [
    "ArrayImages",
    "BatchSource",
    "ImageDataset",
    "MapDataset",
    "check_agreement",
    "check_unchanged",
    "expected",
    "load_dataset",
]
