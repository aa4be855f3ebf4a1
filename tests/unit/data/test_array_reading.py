"""Arrays as other programs write them, and ambiguous arrays, which are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from udddm.config import DataConfig
from udddm.data import ArrayImages, ImageDataset, check_unchanged, load_dataset
from udddm.data.arrays import open_array
from udddm.errors import ConfigError, DataError

PIXELS = np.random.default_rng(7).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


@pytest.mark.parametrize(
    ("first", "second"),
    [(image, label) for image in ("images", "x") for label in ("labels", "label", "y", "target", "targets")]
    + [("arr_0", "arr_1"), ("x_train", "y_train"), ("train_images", "train_labels")],
)
@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_labels_are_found_by_their_usual_names(tmp_path: Path, first: str, second: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, **{first: PIXELS, second: LABELS})  # type: ignore[arg-type]
    else:
        group = zarr.create_group(path)
        group.create_array(first, data=PIXELS)
        group.create_array(second, data=LABELS)
    images, labels = open_array(str(path)).batch(np.arange(40))
    np.testing.assert_array_equal(images, PIXELS.transpose(0, 3, 1, 2))
    assert labels is not None and labels.tolist() == LABELS.tolist()


def test_ignored_arrays_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS, y_train=LABELS, x_test=PIXELS, y_test=LABELS)
    open_array(str(tmp_path / "a.npz"))
    assert "images are x_train, labels are y_train; ignored: x_test, y_test" in caplog.text
    np.savez(tmp_path / "b.npz", images=PIXELS, mask=LABELS)
    open_array(str(tmp_path / "b.npz"))
    assert "labels are missing; ignored: mask" in caplog.text


def test_a_run_from_before_labels_were_found_is_recognized(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS, y=LABELS)
    before = ImageDataset(ArrayImages(PIXELS)).fingerprint()
    check_unchanged(before, ImageDataset(open_array(str(tmp_path / "a.npz"))).fingerprint())


@pytest.mark.parametrize("labels", [LABELS + 1, LABELS + 6, LABELS * 2])
def test_labels_beyond_network_classes_are_refused_before_training(labels: np.ndarray) -> None:
    span = rf"{labels.min()}\.\.{labels.max()}"
    with pytest.raises(ConfigError, match=rf"network\.classes is 4, whose labels are 0\.\.3, but .* in {span}"):
        ImageDataset(ArrayImages(PIXELS, labels)).check_classes(4)
    ImageDataset(ArrayImages(PIXELS, LABELS)).check_classes(4)


class Named:
    classes = ("a", "b", "c", "d")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return PIXELS[index], int(LABELS[index])


@pytest.mark.parametrize("source", [ArrayImages(PIXELS, LABELS), Named()])
def test_more_classes_than_the_data_have_are_reported(source: Any, caplog: pytest.LogCaptureFixture) -> None:
    ImageDataset(source).check_classes(4)
    assert not caplog.text
    ImageDataset(source).check_classes(10)
    assert "network.classes is 10, but the data set has 4 classes" in caplog.text
    assert "set network.classes=4" in caplog.text


def test_labels_of_a_custom_data_set_are_checked_when_read() -> None:
    own = [(PIXELS[i], int(LABELS[i]) + 1) for i in range(40)]
    dataset = ImageDataset(own)
    dataset.check_classes(4)
    dataset.batch(np.array([0, 1, 2]))
    with pytest.raises(DataError, match=r"sample 3 are in 4\.\.4: give integers from 0 to 3, or set network\.classes"):
        dataset.batch(np.arange(4))


def broken_zarr(path: Path, *missing: str, labels: Any = LABELS + 1, images: Any = None) -> None:
    group = zarr.create_group(path)
    found = np.maximum(PIXELS, 1) if images is None else images
    group.create_array("images", data=found, chunks=(10, 8, 8, 3))
    group.create_array("labels", data=labels, chunks=(10,))
    for name in missing:
        (path / name).unlink()


@pytest.mark.parametrize("name", ["images/c/1/0/0/0", "labels/c/2"])
def test_a_missing_chunk_of_zarr_data_is_not_a_black_image(tmp_path: Path, name: str) -> None:
    broken_zarr(tmp_path / "d.zarr", name)
    with pytest.raises(DataError, match=rf"chunk {name.split('/', 1)[1]} is missing.*data\.missing_chunks"):
        ImageDataset(open_array(str(tmp_path / "d.zarr"))).batch(np.arange(40))


def test_stored_black_images_are_read(tmp_path: Path) -> None:
    images = np.maximum(PIXELS, 1)
    images[3:8] = 0
    broken_zarr(tmp_path / "d.zarr", images=images)
    found, _ = open_array(str(tmp_path / "d.zarr")).batch(np.arange(40))
    np.testing.assert_array_equal(found, images.transpose(0, 3, 1, 2))


def test_chunks_that_zarr_omitted_can_be_read_as_the_fill_value(tmp_path: Path) -> None:
    labels = np.sort(LABELS)  # the first chunk contains only zeros, so Zarr does not write it
    broken_zarr(tmp_path / "d.zarr", labels=labels)
    config = DataConfig(name="array", path=str(tmp_path / "d.zarr"))
    with pytest.raises(DataError, match="chunk c/0 is missing"):
        load_dataset(config)
    filled = config.model_copy(update={"missing_chunks": "fill"})
    assert ImageDataset(load_dataset(filled)).batch(np.arange(40))[1].tolist() == labels.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
    "shape", [(40, 8, 8, 2), (40, 4, 4, 3), (8, 8, 3), (8, 8, 1), (32, 32, 3, 500), (3, 32, 32, 500), (28, 28, 1, 90)]
)
def test_an_ambiguous_layout_is_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(DataError, match=r"shape \[.*give images as \["):
        ArrayImages(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((40, 8, 8), (1, 8, 8)),
        ((2, 16, 4, 4), (16, 4, 4)),
        ((2, 4, 32, 32), (4, 32, 32)),
        ((1, 3, 64, 64), (3, 64, 64)),
        ((2, 1, 2, 2), (1, 2, 2)),
        ((2, 3, 4, 2), (3, 4, 2)),
        ((2, 64, 48, 3), (3, 64, 48)),
    ],
)
def test_unambiguous_layouts_are_read(shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    assert ImageDataset(np.zeros(shape, np.uint8)).shape == image
