"""A folder of image files: order, labels, gray or color, resizing, and errors that name the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.data.folder import FolderImages
from udddm.errors import DataError

RNG = np.random.default_rng(0)


def picture(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def everything(root: Path, size: int | None = None) -> torch.Tensor:
    dataset = ImageDataset(load_dataset(DataConfig(name="folder", path=str(root), size=size)))
    return dataset.batch(np.arange(len(dataset)))[0]


def expected(*images: np.ndarray) -> torch.Tensor:
    stacked = np.stack([image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for image in images])
    return torch.from_numpy(stacked).float() / 127.5 - 1


def test_images_are_sorted_by_relative_path(tmp_path: Path) -> None:
    names = ["b/2.png", "a.bmp", "b/1.PNG", "c/d/e.webp", "B.png"]
    images = {name: save(tmp_path / name, picture(4, 6, 3), lossless=True) for name in names}
    save(tmp_path / ".hidden.png", picture(2, 2, 3))
    save(tmp_path / ".cache" / "x.png", picture(2, 2, 3))
    (tmp_path / "notes.txt").write_text("no image")
    assert torch.equal(everything(tmp_path), expected(*(images[name] for name in sorted(names))))


def test_first_level_directories_are_the_classes(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/1.png", "dog/0.png", "eel/0.png"):
        save(tmp_path / name, picture(4, 4))
    dataset = ImageDataset(FolderImages(tmp_path))
    assert (dataset.labelled, dataset.classes) == (True, 3)
    assert FolderImages(tmp_path).class_names == ["cat", "dog", "eel"]
    labels = dataset.batch(np.arange(4))[1]
    assert labels is not None and labels.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("other", ["x.png", "cat/deeper/x.png"])
def test_files_elsewhere_leave_the_folder_without_labels(tmp_path: Path, other: str) -> None:
    for name in ("cat/1.png", "dog/1.png", other):
        save(tmp_path / name, picture(4, 4))
    assert not ImageDataset(FolderImages(tmp_path)).labelled


def test_gray_stays_gray_only_if_all_are(tmp_path: Path) -> None:
    gray = save(tmp_path / "1.png", picture(4, 4))
    assert torch.equal(everything(tmp_path), expected(gray))
    color = save(tmp_path / "2.png", picture(4, 4, 3))
    assert torch.equal(everything(tmp_path), expected(gray[..., None].repeat(3, axis=2), color))


def test_an_opaque_alpha_channel_is_dropped(tmp_path: Path) -> None:
    pixels = picture(4, 4, 4)
    pixels[..., 3] = 255
    save(tmp_path / "1.png", pixels)
    assert torch.equal(everything(tmp_path), expected(pixels[..., :3]))


def test_small_color_images_are_not_mistaken_for_channels(tmp_path: Path) -> None:
    pixels = save(tmp_path / "1.png", picture(3, 5, 3))
    assert torch.equal(everything(tmp_path), expected(pixels))


def test_size_crops_the_center_and_resizes(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the central square, in one color
    save(tmp_path / "wide.png", wide)
    save(tmp_path / "tall.png", wide.transpose(1, 0, 2))
    same = save(tmp_path / "z.png", picture(4, 4, 3))
    images = everything(tmp_path, size=4)
    assert images.shape == (3, 3, 4, 4)
    assert torch.equal(images[:2], torch.full((2, 3, 4, 4), 200.0) / 127.5 - 1)
    assert torch.equal(images[2:], expected(same))


def test_uneven_shapes_name_both_files_before_any_pixel_is_read(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(8, 8))
    save(tmp_path / "b.png", picture(8, 8))
    save(tmp_path / "c.png", picture(8, 9))
    with pytest.raises(DataError, match=r"c\.png is 9x8 \(width x height\), but .*a\.png is 8x8: .* data\.size"):
        FolderImages(tmp_path)


def test_a_truncated_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(tmp_path / name, picture(64, 64, 3))
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[: len(content) // 2])
    dataset = ImageDataset(FolderImages(tmp_path))
    dataset.batch(np.array([0, 2]))
    with pytest.raises(DataError, match=r"cannot read .*b\.jpg as an image \(.*truncated"):
        dataset.batch(np.arange(3))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_an_unreadable_header_is_named_on_opening(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "a.png", picture(4, 4))
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*b\.png as an image"):
        FolderImages(tmp_path)


def test_files_that_disappear_or_change_shape_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name, picture(4, 4))
    dataset = ImageDataset(FolderImages(tmp_path))
    save(tmp_path / "b.png", picture(1, 4))
    with pytest.raises(DataError, match=r"b\.png is now 1x1x4, but was 1x4x4 at the start"):
        dataset.batch(np.array([1]))
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png no longer exists"):
        dataset.batch(np.array([1]))


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "deep.png", np.zeros((4, 4), np.uint16))
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits per channel"):
        FolderImages(tmp_path)


def test_missing_and_empty_folders_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a local directory"):
        FolderImages(tmp_path / "nowhere")
    with pytest.raises(DataError, match="contains no images"):
        FolderImages(tmp_path)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere / "1.png", picture(4, 4))
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert [file.as_posix() for file in FolderImages(root).files] == ["cat/1.png"]


def test_an_empty_batch_has_the_shape_of_an_image(tmp_path: Path) -> None:
    save(tmp_path / "1.png", picture(4, 6, 3))
    assert ImageDataset(FolderImages(tmp_path)).batch(np.zeros(0, np.int64))[0].shape == (0, 3, 4, 6)
