"""`udddm data`: what inspect finds, that resizing is that of ADM and EDM and keeps labels, and that it resumes."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from udddm.cli.data import FILTERS as CHOICES
from udddm.cli.data import main as data_command
from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.errors import ConfigError, DataError
from udddm.testing import image_sets
from udddm.testing.image_sets import LABELS, LOCAL, NAMES, PIXELS
from udddm.tools import automatic
from udddm.tools.dataset import output
from udddm.tools.dataset.filters import FILTERS, adm, edm, lanczos, parse_size
from udddm.tools.dataset.place import section_of

RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of 16 samples, so that 40 images have three."""
    monkeypatch.setattr(output, "PART", 16)


def load(place: Path | str) -> ImageDataset:
    return ImageDataset(load_dataset(DataConfig(**section_of(str(place)))))


def photos(root: Path, count: int = 40, mode: str = "RGB") -> Path:
    """Images of different sizes in two classes."""
    for index in range(count):
        file = root / ("cat", "dog")[index % 2] / f"{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (40 + index, 30 + 2 * index) + ((3,) if mode == "RGB" else ())
        Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(file)
    return root


# What is at a place


@pytest.mark.parametrize("kind", LOCAL)
def test_every_kind_is_recognized(tmp_path: Path, kind: str) -> None:
    name, write = LOCAL[kind]
    path = write(str(tmp_path))
    assert section_of(path)["name"] == name
    images, labels = load(path).batch(np.arange(40))
    assert torch.equal(images, torch.from_numpy(PIXELS).float() / 127.5 - 1)
    assert labels is not None and (labels == LABELS).all()


def test_urls_are_recognized(tmp_path: Path) -> None:
    place = f"memory://recognized-{os.getpid()}"
    for write, name in (
        (image_sets.folder, "folder"),
        (image_sets.zip_archive, "zip"),
        (image_sets.shards, "webdataset"),
    ):
        assert section_of(write(place))["name"] == name
    assert section_of("memory://nowhere/x.zarr")["name"] == "array"


def test_directories_are_recognized_by_their_files(tmp_path: Path) -> None:
    for write, name in ((image_sets.shards, "webdataset"), (image_sets.parquet, "huggingface")):
        (tmp_path / name).mkdir()
        write(str(tmp_path / name))
        assert section_of(str(tmp_path / name))["name"] == name


@pytest.mark.parametrize("kind", ["zip", "webdataset", "save_to_disk"])
def test_training_chooses_settings_for_every_kind(tmp_path: Path, kind: str) -> None:
    path = LOCAL[kind][1](str(tmp_path), np.tile(PIXELS, (2, 1, 12, 12)), np.tile(LABELS, 2))
    section = automatic.data_section(path)
    assert section["size"] == 64  # 72x72 is resized
    config, _ = automatic.choose(section, automatic.Machine(False))
    assert config.network.classes == 4


# Filters


def test_adm_halves_by_a_box_filter_and_crops_to_the_center() -> None:
    pixels = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(adm(Image.fromarray(pixels), (16, 16))) - means).max() < 2  # rounded four times
    wide = Image.fromarray(np.concatenate([np.zeros_like(pixels), pixels, np.zeros_like(pixels)], axis=1))
    assert np.array_equal(np.asarray(adm(wide, (64, 64))), pixels)


def test_adm_is_bicubic_below_a_factor_of_two() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    covering = image.resize((33, 20), Image.Resampling.BICUBIC)  # 50 * 20 / 30 = 33.3
    assert np.array_equal(np.asarray(adm(image, (20, 20))), np.asarray(covering.crop((6, 0, 26, 20))))


def test_edm_is_the_resizing_of_training(tmp_path: Path) -> None:
    root = photos(tmp_path / "f", 4)
    by_training = ImageDataset(load_dataset(DataConfig(name="folder", path=str(root), size=16))).batch(np.arange(4))[0]
    for index, file in enumerate(sorted(root.rglob("*.png"))):
        pixels = np.asarray(edm(Image.open(file), (16, 16))).transpose(2, 0, 1)
        assert np.array_equal(((by_training[index].numpy() + 1) * 127.5).round(), pixels)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", [(9, 7), (64, 64), (100, 33), (33, 100), (1, 1)])
@pytest.mark.parametrize("size", [(8, 8), (12, 6), (6, 12)])
def test_filters_give_the_size(name: str, shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert FILTERS[name](Image.new("RGB", shape, (9, 9, 9)), size).size == size


def test_lanczos_keeps_the_borders() -> None:
    image = Image.new("L", (40, 20), 255)
    assert np.asarray(lanczos(image, (10, 10))).min() == 255
    assert list(FILTERS) == list(CHOICES)


def test_sizes_are_height_by_width() -> None:
    assert parse_size("64") == (64, 64) and parse_size("48x96") == (96, 48)
    for wrong in ("", "x", "0", "4x", "axb", "1x2x3", "-3", "²"):
        with pytest.raises(ConfigError, match="write a number of pixels"):
            parse_size(wrong)


# Resizing


@pytest.mark.parametrize("target", ["out.zip", "out", "out.zarr"])
def test_formats_hold_the_same_images_and_labels(tmp_path: Path, target: str, small_parts: None) -> None:
    root = photos(tmp_path / "f")
    assert data_command(["resize", str(root), str(tmp_path / target), "--size", "12x8"]) == 0
    assert not list(tmp_path.glob("*.partial"))
    found = load(tmp_path / target)
    images, labels = found.batch(np.arange(40))
    assert images.shape == (40, 3, 12, 8) and found.class_names == ["cat", "dog"]
    assert labels is not None and labels.tolist() == [0] * 20 + [1] * 20
    for index, file in enumerate(sorted(root.rglob("*.png"))):
        pixels = np.asarray(adm(Image.open(file), (8, 12))).transpose(2, 0, 1)
        assert np.array_equal(((images[index].numpy() + 1) * 127.5).round(), pixels)


def test_the_zip_archive_is_that_of_edm(tmp_path: Path) -> None:
    data_command(["resize", image_sets.npz(str(tmp_path)), str(tmp_path / "o.zip"), "--size", "4"])
    with zipfile.ZipFile(tmp_path / "o.zip") as archive:
        names = [f"00000/img{index:08d}.png" for index in range(40)]
        assert archive.namelist() == [*names, "dataset.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        labels = json.loads(archive.read("dataset.json"))["labels"]
        assert labels == [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]


def test_black_images_and_gray_ones_survive(tmp_path: Path) -> None:
    """A Zarr chunk of zeros is stored, because a missing one counts as lost."""
    for index in range(5):
        Image.new("L", (9, 9), 0).save(tmp_path / f"{index}.png")
    assert data_command(["resize", str(tmp_path), str(tmp_path / "o.zarr"), "--size", "4"]) == 0
    images, labels = load(tmp_path / "o.zarr").batch(np.arange(5))
    assert images.shape == (5, 1, 4, 4) and (images == -1).all() and labels is None


def killed_at(count: int, command: Callable[[], object]) -> bool:
    """Runs a command in a fork that kills itself at the file operation `count`. Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        seen = 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            command()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def same(first: Path, second: Path) -> bool:
    """Whether two files, or all files of two directories, have equal bytes."""
    if first.is_file():
        return filecmp.cmp(first, second, shallow=False)
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (first, second)]
    files = [name for name in names[0] if (first / name).is_file()]
    return names[0] == names[1] and filecmp.cmpfiles(first, second, files, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("suffix", [".zip", "", ".zarr"])
def test_a_killed_command_resumes_with_the_same_bytes(tmp_path: Path, suffix: str, small_parts: None) -> None:
    source = image_sets.zip_archive(str(tmp_path))
    undisturbed, target = tmp_path / f"undisturbed{suffix}", tmp_path / f"out{suffix}"
    assert data_command(["resize", source, str(undisturbed), "--size", "4"]) == 0

    def command() -> None:
        data_command(["resize", source, str(target), "--size", "4"])

    for count in range(3, 400, 23):
        kills = 0
        while killed_at(count * (1 + kills), command):  # each time later, or it would never end
            kills += 1
            assert not target.exists() or same(target, undisturbed)
        assert same(target, undisturbed), count
        assert not list(tmp_path.glob("*.partial")), count
        if kills == 0:
            return
        os.system(f"rm -r '{target}'")
    pytest.fail("the last kill was not after the end")


def test_temporary_files_of_zarr_do_not_stay(tmp_path: Path, small_parts: None) -> None:
    source, target = image_sets.zip_archive(str(tmp_path)), tmp_path / "o.zarr"

    def command() -> None:
        data_command(["resize", source, str(target), "--size", "4"])

    data = tmp_path / "o.zarr.partial" / "data"
    count = 10
    while not list(data.glob("images/c/0/0/0/*")):  # killed after the first part
        assert killed_at(count, command)
        count += 10
    (data / "zarr.json.0123.partial").write_bytes(b"{")
    command()
    assert len(load(target)) == 40 and not list(target.rglob("*.partial"))


def test_a_target_that_exists_or_belongs_to_another_command_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_parts: None
) -> None:
    source, target = image_sets.zip_archive(str(tmp_path)), tmp_path / "o.zip"
    target.write_text("mine")
    assert data_command(["resize", source, str(target), "--size", "4"]) == 2
    assert "exists: remove it, or give another path" in capsys.readouterr().err and target.read_text() == "mine"
    target.unlink()
    assert killed_at(25, lambda: data_command(["resize", source, str(target), "--size", "4"]))
    assert (tmp_path / "o.zip.partial" / "plan.json").exists()
    assert data_command(["resize", source, str(target), "--size", "5", "--filter", "edm"]) == 2
    assert "was begun with other settings or data (filter, size differ)" in capsys.readouterr().err
    assert data_command(["resize", source, str(target), "--size", "4"]) == 0


def test_a_damaged_picture_stops_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photos(tmp_path / "f", 4)
    file = root / "cat" / "002.png"
    file.write_bytes(file.read_bytes()[:600])
    assert data_command(["resize", str(root), str(tmp_path / "o.zip"), "--size", "4"]) == 1
    assert str(file) in capsys.readouterr().err and not (tmp_path / "o.zip").exists()


def test_latents_cannot_be_resized(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 8, 8), np.float32))
    with pytest.raises(DataError, match="only gray or RGB images in uint8"):
        from udddm.tools.dataset.source import open_pictures

        open_pictures(DataConfig(name="array", path=str(tmp_path / "a.npy")))


# Inspecting


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = data_command(["inspect", *arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


@pytest.mark.parametrize("kind", LOCAL)
def test_inspect_measures_what_training_chooses(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, write = LOCAL[kind]
    code, found = inspected(capsys, write(str(tmp_path)))
    assert code == 0 and found["images"] == 40 and found["name"] == name
    assert found["shapes"] == {"3x6x6": 40} and found["damaged"] == {} and found["duplicates"] == []
    known = NAMES if name == "huggingface" else ["0", "1", "2", "3"]
    assert found["classes"] == dict(zip(known, np.bincount(LABELS).tolist(), strict=True))
    pixels = torch.from_numpy(PIXELS).float() / 127.5 - 1
    assert found["sigma_data"] == pytest.approx(float(pixels.std()), rel=1e-5)
    assert found["range"] == [float(pixels.min()), float(pixels.max())]


def test_inspect_names_damaged_files_and_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photos(tmp_path / "f", 6)
    Image.open(root / "cat" / "002.png").save(root / "dog" / "copy.bmp")  # another format with the same pixels
    Image.new("L", (5, 5)).save(root / "cat" / "gray.png")
    cut = root / "dog" / "005.png"
    cut.write_bytes(cut.read_bytes()[:900])
    code, found = inspected(capsys, str(root))
    assert code == 1 and list(found["damaged"]) == [str(cut)] and str(cut) in found["damaged"][str(cut)]
    assert found["duplicates"] == [[str(root / "cat" / "002.png"), str(root / "dog" / "copy.bmp")]]
    assert found["modes"] == {"RGB": 6, "L": 1} and len(found["shapes"]) == 6
    assert found["images"] == 8 and found["classes"] == {"cat": 4, "dog": 4}
    assert data_command(["inspect", str(root)]) == 1
    text = capsys.readouterr().out
    assert "8 images in" in text and "1 images have the pixels of another" in text and str(cut) in text


def test_inspect_lists_damaged_samples_of_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((5, 1, 4, 4), np.float32)
    images[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", images)
    code, found = inspected(capsys, str(tmp_path / "a.npy"))
    assert code == 1 and list(found["damaged"]) == ["sample 3"]
    assert found["duplicates"] == [[f"sample {index}" for index in (0, 1, 2, 4)]]
