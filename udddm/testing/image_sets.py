"""Writes the same images as every kind of data set, with the packages that users write them with.

Every writer takes a directory or URL, and images uint8 [N, C, H, W] with labels int [N], and returns the path of the
data set. They need webdataset and datasets (the extra `test`).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt

Images = npt.NDArray[Any]

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 3, 6, 6), dtype=np.uint8)
LABELS = np.arange(40) * 7 % 4
NAMES = ["cat", "dog", "eel", "fox"]


def png(pixels: Images) -> bytes:
    """A PNG file of an image [C, H, W], C = 1 or 3."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.save(file, format="PNG")
    return file.getvalue()


def edm_name(index: int) -> str:
    return f"{index:08d}"[:5] + f"/img{index:08d}.png"


def edm_files(pixels: Images, labels: Images) -> dict[str, bytes]:
    """The files that dataset_tool.py of EDM writes."""
    files = {edm_name(index): png(image) for index, image in enumerate(pixels)}
    pairs = [[edm_name(index), int(label)] for index, label in enumerate(labels)]
    return {**files, "dataset.json": json.dumps({"labels": pairs}).encode()}


def folder(place: str, pixels: Images = PIXELS, labels: Images = LABELS) -> str:
    for name, content in edm_files(pixels, labels).items():
        with fsspec.open(f"{place}/images/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)
    return f"{place}/images"


def zip_archive(place: str, pixels: Images = PIXELS, labels: Images = LABELS) -> str:
    with fsspec.open(f"{place}/images.zip", "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in edm_files(pixels, labels).items():
            archive.writestr(name, content)
    return f"{place}/images.zip"


def deflated(place: str, pixels: Images = PIXELS, labels: Images = LABELS) -> str:
    with fsspec.open(f"{place}/small.zip", "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in edm_files(pixels, labels).items():
            archive.writestr(name, content)
    return f"{place}/small.zip"


def shards(place: str, pixels: Images = PIXELS, labels: Images = LABELS, each: int = 15) -> str:
    import webdataset

    number = 0
    for number, first in enumerate(range(0, len(pixels), each)):
        with fsspec.open(f"{place}/shards-{number:03d}.tar", "wb") as file, webdataset.TarWriter(file) as writer:
            for index in range(first, min(first + each, len(pixels))):
                image = np.ascontiguousarray(pixels[index].transpose(1, 2, 0))
                writer.write(
                    {
                        "__key__": f"{index:06d}",
                        "png": image if image.shape[2] == 3 else png(pixels[index]),
                        "cls": int(labels[index]),
                        "json": {"class": int(labels[index]), "text": "a picture"},
                    }
                )
    return f"{place}/shards-{{000..{number:03d}}}.tar"


def rows(pixels: Images = PIXELS, labels: Images = LABELS) -> Any:
    """A `datasets.Dataset` in memory."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = [{"bytes": png(image), "path": None} for image in pixels]
    return datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


def saved(place: str, pixels: Images = PIXELS, labels: Images = LABELS) -> str:
    rows(pixels, labels).save_to_disk(f"{place}/saved")
    return f"{place}/saved"


def parquet(place: str, pixels: Images = PIXELS, labels: Images = LABELS) -> str:
    rows(pixels, labels).to_parquet(f"{place}/train.parquet")
    return f"{place}/train.parquet"


def npz(place: str, pixels: Images = PIXELS, labels: Images = LABELS) -> str:
    np.savez(Path(place) / "images.npz", images=pixels, labels=labels)
    return f"{place}/images.npz"


def zarr_group(place: str, pixels: Images = PIXELS, labels: Images = LABELS) -> str:
    import zarr

    group = zarr.create_group(f"{place}/images.zarr")
    group.create_array("images", data=pixels, chunks=(1, *pixels.shape[1:]), shards=(20, *pixels.shape[1:]))
    group.create_array("labels", data=labels, config={"write_empty_chunks": True})
    return f"{place}/images.zarr"


ANYWHERE: dict[str, tuple[str, Callable[..., str]]] = {
    "folder": ("folder", folder),
    "zip": ("zip", zip_archive),
    "deflated zip": ("zip", deflated),
    "webdataset": ("webdataset", shards),
}
"""Name and writer of the kinds that may be at a URL."""
LOCAL: dict[str, tuple[str, Callable[..., str]]] = {
    **ANYWHERE,
    "save_to_disk": ("huggingface", saved),
    "parquet": ("huggingface", parquet),
    "npz": ("array", npz),
    "zarr": ("array", zarr_group),
}
