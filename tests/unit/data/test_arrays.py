"""Stored arrays: every format, at local paths and URLs, gives the same images; corruption is reported."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import zarr

from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.data.arrays import open_array
from udddm.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 3, 6, 5), dtype=np.uint8)
LABELS = np.arange(30) % 4
EXPECTED = torch.from_numpy(PIXELS).float() / 127.5 - 1


@pytest.fixture(params=["path", "file URL", "memory URL"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A directory to write to, as a path or a URL."""
    if request.param == "memory URL":
        name = uuid.uuid4().hex
        yield f"memory://{name}"
        memory = fsspec.filesystem("memory")
        if memory.exists(name):
            memory.rm(name, recursive=True)
    else:
        yield str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


def write_npy(url: str, images: Any, labels: Any = None) -> None:
    with fsspec.open(url, "wb") as file:
        np.save(file, images, allow_pickle=True)


def write_npz(url: str, images: Any, labels: Any = None) -> None:
    with fsspec.open(url, "wb") as file:
        np.savez(file, images=images, **({} if labels is None else {"labels": labels}))


def write_zarr(url: str, images: Any, labels: Any = None) -> None:
    url = url.removeprefix("file://")  # zarr would not create the directory
    if labels is None:
        zarr.create_array(url, data=images, chunks=(7, *images.shape[1:]))
        return
    group = zarr.create_group(url)
    group.create_array("images", data=images, chunks=(7, *images.shape[1:]))
    group.create_array("labels", data=labels)


KINDS: dict[str, Callable[..., None]] = {".npy": write_npy, ".npz": write_npz, ".zarr": write_zarr}


def read(url: str, ids: Any = slice(None)) -> torch.Tensor:
    dataset = ImageDataset(load_dataset(DataConfig(name="array", path=url)))
    return dataset.batch(np.arange(len(dataset))[ids])[0]


@pytest.mark.parametrize("suffix", KINDS)
def test_every_format_at_every_location_gives_the_same_images(place: str, suffix: str) -> None:
    url = f"{place}/images{suffix}"
    KINDS[suffix](url, PIXELS)
    shuffled = np.array([29, 3, 3, 0, 14, 7])
    assert torch.equal(read(url), EXPECTED)
    assert torch.equal(read(url, shuffled), EXPECTED[shuffled])
    assert read(url, slice(0)).shape == (0, 3, 6, 5)
    assert not ImageDataset(open_array(url)).labelled


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_labels_are_read_with_the_images(place: str, suffix: str) -> None:
    url = f"{place}/images{suffix}"
    KINDS[suffix](url, PIXELS, LABELS)
    dataset = ImageDataset(open_array(url))
    images, labels = dataset.batch(np.array([5, 2, 5]))
    assert torch.equal(images, EXPECTED[[5, 2, 5]])
    assert labels is not None and labels.tolist() == LABELS[[5, 2, 5]].tolist()
    assert dataset.classes == 4


LAYOUTS = {
    "[N, H, W, C]": (PIXELS.transpose(0, 2, 3, 1), EXPECTED),
    "[N, H, W]": (PIXELS[:, 0], EXPECTED[:, :1]),
    "float32": (EXPECTED.numpy(), EXPECTED),
    "float16": (EXPECTED.half().numpy(), EXPECTED.half().float()),
    "big-endian": (EXPECTED.numpy().astype(">f4"), EXPECTED),
    "column-major": (np.asfortranarray(PIXELS), EXPECTED),
}


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_channels_first(tmp_path: Path, layout: str, suffix: str) -> None:
    images, expected = LAYOUTS[layout]
    KINDS[suffix](str(tmp_path / f"images{suffix}"), images)
    assert torch.equal(read(str(tmp_path / f"images{suffix}")), expected)


@pytest.mark.parametrize("suffix", KINDS)
def test_arrays_that_are_not_images_are_refused(tmp_path: Path, suffix: str) -> None:
    for number, (images, message) in enumerate(
        [
            (np.zeros((4, 3, 6, 5), np.int32), "has dtype int32: give uint8"),
            (np.zeros((4, 3)), r"has shape \[4, 3\]"),
            (np.zeros((4, 6, 5, 3), np.float32), r"give float images as \[C, H, W\]"),
        ]
    ):
        url = str(tmp_path / f"{number}{suffix}")
        KINDS[suffix](url, images)
        with pytest.raises(DataError, match=f"{number}{suffix}.*{message}"):
            open_array(url)


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_labels_must_match_the_images(tmp_path: Path, suffix: str) -> None:
    url = str(tmp_path / f"images{suffix}")
    KINDS[suffix](url, PIXELS, LABELS[:9])
    with pytest.raises(DataError, match=r"labels of .* have shape \[9\], but there are 30 images"):
        open_array(url)


def test_the_only_array_may_have_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", arr_0=PIXELS, labels=LABELS)
    np.savez(tmp_path / "two.npz", a=PIXELS, b=PIXELS)
    np.savez(tmp_path / "none.npz", labels=LABELS)
    zarr.create_group(tmp_path / "group").create_array("pictures", data=PIXELS)
    assert torch.equal(read(str(tmp_path / "one.npz")), EXPECTED)
    assert torch.equal(read(str(tmp_path / "group")), EXPECTED)
    for name, found in (("two.npz", "a, b"), ("none.npz", "none")):
        with pytest.raises(DataError, match=f"one named 'images'; it has: {found}"):
            open_array(str(tmp_path / name))


@pytest.mark.parametrize("suffix", KINDS)
def test_a_missing_array_is_reported(place: str, suffix: str) -> None:
    with pytest.raises(DataError, match=f"missing{suffix}"):
        open_array(f"{place}/missing{suffix}")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_truncated_files_are_named(place: str, suffix: str, keep: int) -> None:
    url = f"{place}/images{suffix}"
    KINDS[suffix](url, PIXELS)
    with fsspec.open(url, "rb") as file:
        content = file.read()
    with fsspec.open(url, "wb") as file:
        file.write(content[:keep])
    with pytest.raises(DataError, match=f"cannot read .*images{suffix} as a {suffix} file"):
        open_array(url)


def test_pickles_are_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "images.npy")
    write_npy(url, np.array([PIXELS[0], "object"], dtype=object))
    with pytest.raises(DataError, match=r"cannot read .* as a \.npy file"):
        open_array(url)


def test_a_file_of_another_format_is_reported(place: str) -> None:
    write_npz(f"{place}/a.npy", PIXELS)
    write_npy(f"{place}/b.npz", PIXELS)
    for name in ("a.npy", "b.npz"):
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            open_array(f"{place}/{name}")


def test_an_unknown_protocol_is_reported() -> None:
    for suffix in KINDS:
        with pytest.raises(DataError, match="nosuch://"):
            open_array(f"nosuch://bucket/images{suffix}")


def test_a_local_npy_file_stays_on_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", PIXELS)
    assert isinstance(open_array(str(tmp_path / "images.npy"))._images, np.memmap)


def test_zarr_reads_only_the_requested_chunks_and_names_a_corrupt_one(tmp_path: Path) -> None:
    write_zarr(str(tmp_path / "images.zarr"), PIXELS)
    chunks = sorted(file for file in (tmp_path / "images.zarr" / "c").rglob("*") if file.is_file())
    chunks[-1].write_bytes(b"damaged")
    dataset = ImageDataset(open_array(str(tmp_path / "images.zarr")))
    assert torch.equal(dataset.batch(np.arange(28))[0], EXPECTED[:28])
    with pytest.raises(DataError, match=r"cannot read samples 3\.\.29 of .*images\.zarr"):
        dataset.batch(np.array([29, 3]))
