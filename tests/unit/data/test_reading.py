"""Image files and folders as other programs write them, and ambiguous ones, which are refused."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from udddm.config import resolve
from udddm.data import ArrayImages, ImageDataset, check_unchanged
from udddm.data.folder import FolderImages
from udddm.errors import DataError
from udddm.runs.run import check_or_record

RANDOM = np.random.default_rng(7)


def photo(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def all_of(dataset: Any) -> tuple[torch.Tensor, Any]:
    images = ImageDataset(dataset)
    return images.batch(np.arange(len(images)))


UNTURN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
"""The transformation that stores an image with each EXIF orientation."""


@pytest.mark.parametrize("turn", UNTURN)
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_images_are_rotated_according_to_exif(tmp_path: Path, turn: int, suffix: str) -> None:
    exif, upright = Image.Exif(), photo(6, 10, 3)
    exif[0x0112] = turn
    save_image(tmp_path / "f" / f"a.{suffix}", np.ascontiguousarray(UNTURN[turn](upright)), exif=exif, lossless=True)
    save_image(tmp_path / "f" / "b.png", upright)
    images, _ = all_of(FolderImages(tmp_path / "f"))
    assert torch.equal(images[0], images[1])
    from_python, _ = all_of([Image.open(tmp_path / "f" / name) for name in (f"a.{suffix}", "b.png")])
    assert torch.equal(from_python, images)


def test_an_orientation_after_the_pixels_of_a_png_is_applied(tmp_path: Path) -> None:
    exif, upright = Image.Exif(), photo(6, 10, 3)
    exif[0x0112] = 6
    save_image(tmp_path / "a.png", np.ascontiguousarray(np.rot90(upright)))
    content = (tmp_path / "a.png").read_bytes()
    payload = exif.tobytes().removeprefix(b"Exif\0\0")
    (tmp_path / "a.png").write_bytes(content[:-12] + _chunk(b"eXIf", payload) + content[-12:])
    save_image(tmp_path / "b.png", upright)
    images, _ = all_of(FolderImages(tmp_path))
    assert torch.equal(images[0], images[1])


def test_corrupt_exif_data_are_ignored(tmp_path: Path) -> None:
    pixels = photo(6, 10, 3)
    save_image(tmp_path / "a.png", pixels, exif=b"Exif\0\0MM\0*\0\0")
    save_image(tmp_path / "b.png", pixels)
    images, _ = all_of(FolderImages(tmp_path))
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_parts_are_white_in_a_folder_and_from_python(tmp_path: Path, mode: str) -> None:
    gray = np.full((8, 8), 100, np.uint8)
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, 4:] = 0
    rgba = Image.fromarray(np.dstack([gray, gray, gray, alpha]))
    picture = rgba.convert("LA") if mode == "LA" else rgba
    if mode in ("P", "PA"):
        picture = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8))
        picture.putpalette([0, 0, 0, 100, 100, 100])
        picture.info["transparency"] = 0
    picture.save(tmp_path / "a.png")
    images, _ = all_of(FolderImages(tmp_path))
    assert images.shape[1] == (1 if mode == "LA" else 3)
    assert (images[..., 4:] == 1).all()
    torch.testing.assert_close(images[..., :4], torch.full_like(images[..., :4], 100 / 127.5 - 1))
    assert torch.equal(all_of([Image.open(tmp_path / "a.png")])[0], images)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(path: Path, color: tuple[int, ...], kind: int) -> None:
    rows = b"".join(b"\0" + struct.pack(f">{len(color)}H", *color) * 8 for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize(("color", "kind"), [((4000, 3000, 200), 2), ((4000, 3000, 200, 65535), 6), ((4000, 65535), 4)])
def test_sixteen_bits_per_channel_are_refused_in_color(tmp_path: Path, color: tuple[int, ...], kind: int) -> None:
    deep_png(tmp_path / "deep.png", color, kind)
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits per channel.*convert it to 8 bits"):
        FolderImages(tmp_path)
    with Image.open(tmp_path / "deep.png") as deep, pytest.raises(DataError, match="sample 0 has more than 8 bits"):
        ImageDataset([deep])


def test_a_deep_ppm_from_python_is_refused_and_a_plain_one_read(tmp_path: Path) -> None:
    (tmp_path / "deep.ppm").write_bytes(b"P6 4 4 4095\n" + b"\x0f\xa0" * 48)
    with Image.open(tmp_path / "deep.ppm") as deep, pytest.raises(DataError, match="more than 8 bits"):
        ImageDataset([deep])
    save_image(tmp_path / "plain.ppm", photo(4, 4, 3))
    with Image.open(tmp_path / "plain.ppm") as plain:
        assert ImageDataset([plain]).shape == (3, 4, 4)


def test_files_of_other_formats_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.gif", "c.tif", "d.tiff", "e.ppm"):
        save_image(tmp_path / name, photo(8, 8, 3))
    save_image(tmp_path / "g.JFIF", photo(8, 8, 3), format="JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    assert len(FolderImages(tmp_path)) == 1
    assert "5 files are ignored: 1 .gif, 1 .jfif, 1 .ppm, 1 .tif, 1 .tiff" in caplog.text
    assert ".txt" not in caplog.text


def classes(root: Path, *names: str) -> None:
    for name in names:
        save_image(root / name / "0.png", photo(8, 8, 3))


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    classes(tmp_path, "bee", "cat")
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"class directory .*ant contains no readable images"):
        FolderImages(tmp_path)
    save_image(tmp_path / "ant" / "0.tif", photo(8, 8, 3))
    with pytest.raises(DataError, match=r"class directory .*ant contains no readable images \(it contains: 1 .tif\)"):
        FolderImages(tmp_path)
    (tmp_path / "ant").rename(tmp_path / ".ant")
    assert FolderImages(tmp_path).class_names == ["bee", "cat"]


def test_a_class_that_is_a_link_to_another_is_refused(tmp_path: Path) -> None:
    classes(tmp_path, "bee", "cat")
    (tmp_path / "wasp").symlink_to(tmp_path / "bee")
    with pytest.raises(DataError, match=r"class directory .*wasp contains no readable images"):
        FolderImages(tmp_path)


def test_a_directory_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(tmp_path, "ant", "bee")
    scan = os.scandir

    def scandir(place: Any = ".") -> Any:
        if str(place).endswith("ant"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"ant cannot be listed \(Permission denied\)"):
        FolderImages(tmp_path)


def edm_folder(root: Path, count: int = 4) -> list[str]:
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(count)]
    for i, name in enumerate(names):
        save_image(root / name, np.full((8, 8, 3), i * 10, np.uint8))
    return names


def test_labels_come_from_dataset_json(tmp_path: Path) -> None:
    names = edm_folder(tmp_path)
    entries = [[name, label] for name, label in zip(names, (7, 3, 7, 3), strict=True)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": entries}))
    dataset = ImageDataset(FolderImages(tmp_path))
    labels = dataset.batch(np.arange(4))[1]
    assert labels is not None and labels.tolist() == [7, 3, 7, 3]
    assert dataset.classes == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"labels": [["00000/img00000000.png", 1]]}', r"no label for 00000/img00000001\.png and 2 other files"),
        ('{"labels": [["00000/img00000000.png", 0.5]]}', "label of 00000/img00000000.png is 0.5: labels are integers"),
        ('{"labels": [["00000/img00000000.png", [0, 1]]]}', "labels are integers >= 0"),
        ('{"labels": [["00000/img00000000.png"]]}', "is not a pair"),
        ('{"labels": {}}', "must be a list"),
        ('{"labels": ', "Expecting value"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    edm_folder(tmp_path)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=rf"dataset\.json.*{message}"):
        FolderImages(tmp_path)


@pytest.mark.parametrize("step", [1, 1000], ids=["EDM", "FFHQ"])
@pytest.mark.parametrize("index", [True, False])
def test_numbered_directories_are_not_classes(tmp_path: Path, step: int, index: bool) -> None:
    for i in (0, 999, 1000, 2001):
        save_image(tmp_path / f"{i // 1000 * step:05d}" / f"{i:05d}.png", photo(8, 8, 3))
    if index:
        (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert not ImageDataset(FolderImages(tmp_path)).labelled


def test_a_run_without_classes_resumes_on_a_folder_with_numbered_directories(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in (0, 999, 1000):
        save_image(data / f"{i // 1000:05d}" / f"{i:05d}.png", photo(8, 8, 3))
    now = FolderImages(data)
    images, _ = now.batch(np.arange(3))
    before = ImageDataset(ArrayImages(images, np.array([0, 0, 1])))
    config = resolve({"data": {"name": "folder", "path": str(data)}})
    with_classes = resolve({**config.model_dump(mode="json"), "network": {"classes": 2}})
    for name, each in (("plain", config), ("labelled", with_classes)):
        (tmp_path / name).mkdir()
        check_or_record(tmp_path / name, each, before)
    check_or_record(tmp_path / "plain", config, ImageDataset(now))
    with pytest.raises(DataError, match="the contents of its samples differ"):
        check_or_record(tmp_path / "labelled", with_classes, ImageDataset(now))


def test_a_zip_file_is_refused_with_a_hint_to_unpack_it(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"data\.zip is a file, not a folder: unpack it"):
        FolderImages(tmp_path / "data.zip")


def test_class_names_are_recorded_with_the_run(tmp_path: Path) -> None:
    classes(tmp_path, "ant", "bee")
    recorded = ImageDataset(FolderImages(tmp_path)).fingerprint()
    assert recorded["class_names"] == ["ant", "bee"]
    (tmp_path / "bee").rename(tmp_path / "wasp")
    current = ImageDataset(FolderImages(tmp_path)).fingerprint()
    with pytest.raises(DataError, match="its classes were ant, bee and now are ant, wasp"):
        check_unchanged(recorded, current)
    check_unchanged({key: value for key, value in recorded.items() if key != "class_names"}, current)
