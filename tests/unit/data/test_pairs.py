"""Paired data sets: every kind gives the same pairs, matched by name, and what does not fit is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm.cli.main import main
from udddm.config import resolve
from udddm.config.run import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.data.encoded import ImageFiles
from udddm.data.pairs import MatchedFiles, PairedImages
from udddm.data.reading import ProcessReader
from udddm.errors import ConfigError, DataError
from udddm.testing.image_sets import Images, png, zip_archive

pytest.importorskip("PIL")
COUNT = 12
PIXELS = np.random.default_rng(3).integers(0, 256, (COUNT, 3, 6, 8), dtype=np.uint8)
OTHERS = 255 - PIXELS
Written = dict[str, Any]


def files(folder: Path, pixels: Images, suffix: str = ".png") -> Path:
    """Image files in two directories, the classes."""
    for index, image in enumerate(pixels):
        place = folder / ("ab"[index // 6]) / f"{index:02d}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(image))
    return folder


def folders(root: Path) -> Written:
    # PNG files, whatever their extension
    places = files(root / "photos", PIXELS), files(root / "sketches", OTHERS, suffix=".bmp")
    return {"name": "folder", "path": str(places[0]), "condition": {"path": str(places[1])}}


def archives(root: Path) -> Written:
    places = []
    for name, pixels in (("photos", PIXELS), ("sketches", OTHERS)):
        (root / name).mkdir()
        places.append(zip_archive(str(root / name), pixels, np.zeros(COUNT, int)))
    return {"name": "zip", "path": places[0], "condition": {"path": places[1]}}


def npz(root: Path) -> Written:
    np.savez(root / "pairs.npz", images=PIXELS, labels=np.arange(COUNT) // 6, conditions=OTHERS)
    return {"name": "array", "path": str(root / "pairs.npz"), "condition": {}}


def npy(root: Path) -> Written:
    np.save(root / "images.npy", PIXELS)
    np.save(root / "others.npy", OTHERS)
    return {"name": "array", "path": str(root / "images.npy"), "condition": {"path": str(root / "others.npy")}}


def zarr_group(root: Path) -> Written:
    import zarr

    group = zarr.create_group(str(root / "pairs.zarr"))
    for name, pixels in (("images", PIXELS), ("edges", OTHERS)):
        group.create_array(name, data=pixels, chunks=(1, *pixels.shape[1:]))
    return {"name": "array", "path": str(root / "pairs.zarr"), "condition": {"image": "edges"}}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def shards(root: Path, extension: str = "condition.png") -> Written:
    for number in (0, 1):
        with tarfile.open(root / f"train-{number}.tar", "w") as archive:
            for index in range(6 * number, 6 * number + 6):
                add(archive, f"{index:03d}.{extension}", png(OTHERS[index]))
                add(archive, f"{index:03d}.png", png(PIXELS[index]))
    return {"name": "webdataset", "path": str(root / "train-{0..1}.tar"), "condition": {}}


def table(root: Path) -> Written:
    datasets = pytest.importorskip("datasets")
    columns = {
        name: [{"bytes": png(image), "path": None} for image in pixels]
        for name, pixels in (("image", PIXELS), ("conditioning_image", OTHERS))
    }
    features = datasets.Features({name: datasets.Image() for name in columns})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(root / "saved"))
    return {"name": "huggingface", "path": str(root / "saved"), "condition": {}}


KINDS: dict[str, Callable[[Path], Written]] = {
    each.__name__: each for each in (folders, archives, npz, npy, zarr_group, shards, table)
}


def data(written: Written, **more: Any) -> DataConfig:
    return DataConfig.model_validate({**written, **more, "condition": {"kind": "pairs", **written["condition"]}})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_pairs(tmp_path: Path, kind: str) -> None:
    written = KINDS[kind](tmp_path)
    for _ in range(2):  # the second time with the indices of shards
        dataset = ImageDataset(load_dataset(data(written)))
        assert dataset.paired and dataset.shape == (3, 6, 8) and len(dataset) == COUNT
        read = dataset.read(np.arange(COUNT)[::-1])[0]
        expected = np.concatenate([PIXELS, OTHERS], 1)[::-1] / 127.5 - 1
        assert np.allclose(read.numpy(), expected, atol=1e-6)
        assert torch.equal(dataset.batch(np.array([4]))[0], read[COUNT - 5][None, :3])
    image, condition, *_ = load_dataset(data(written))[7]
    assert np.array_equal(image, PIXELS[7]) and np.array_equal(condition, OTHERS[7])
    plain = DataConfig.model_validate({**written, "condition": {}})  # the images alone
    assert not ImageDataset(load_dataset(plain)).paired


@pytest.mark.parametrize("kind", ["folders", "npz"])
def test_labels_are_those_of_the_images(tmp_path: Path, kind: str) -> None:
    dataset = ImageDataset(load_dataset(data(KINDS[kind](tmp_path))))
    labels = dataset.read(np.arange(COUNT))[1]
    assert labels is not None and labels.tolist() == [0] * 6 + [1] * 6 and dataset.classes == 2


@pytest.mark.parametrize("kind", ["folders", "npz", "npy"])
def test_the_fingerprint_covers_the_conditions(tmp_path: Path, kind: str) -> None:
    before = ImageDataset(load_dataset(data(KINDS[kind](tmp_path)))).fingerprint()
    (tmp_path / "again").mkdir()
    assert ImageDataset(load_dataset(data(KINDS[kind](tmp_path / "again")))).fingerprint() == before
    written = {"folders": folders, "npz": npz, "npy": npy}[kind](tmp_path)
    OTHERS[0, 0, 0, 0] ^= 1
    try:
        KINDS[kind](tmp_path)
    finally:
        OTHERS[0, 0, 0, 0] ^= 1
    found = ImageDataset(load_dataset(data(written))).fingerprint()
    assert found["digest"] != before["digest"] and found.get("content", "") != before.get("content", "-")


def test_reading_processes_decode_both(tmp_path: Path) -> None:
    dataset = ImageDataset(load_dataset(data(folders(tmp_path))))
    reader = ProcessReader(dataset, 2)
    try:
        ids = np.array([3, 9, 0])
        assert torch.equal(reader.request(ids)(ids)[0], dataset.read(ids)[0])
    finally:
        reader.close()
    assert ImageDataset(load_dataset(data(npy(tmp_path)))).in_memory
    assert not dataset.in_memory and torch.equal(pickle.loads(pickle.dumps(dataset)).read(ids)[0], dataset.read(ids)[0])


def test_both_are_resized_and_a_gray_sketch_of_a_photo_in_color_is_read_in_color(tmp_path: Path) -> None:
    written = folders(tmp_path)
    for index, image in enumerate(OTHERS):
        wide = np.repeat(np.repeat(image[:1], 2, 1), 2, 2)  # 12x16 pixels, gray
        (tmp_path / "sketches" / "ab"[index // 6] / f"{index:02d}.bmp").write_bytes(png(wide))
    with pytest.raises(DataError, match=r"sketches/a/00.bmp and .*photos/a/00.png belong together, but .* 16x12 .*8x6"):
        load_dataset(data(written))
    dataset = ImageDataset(load_dataset(data(written, size=6)))
    read = dataset.read(np.arange(COUNT))[0]
    assert read.shape == (COUNT, 6, 6, 6)
    assert torch.equal(read[:, 3], read[:, 4]) and not torch.equal(read[:, 0], read[:, 1])


def test_a_sketch_in_color_of_a_gray_image_is_one_error(tmp_path: Path) -> None:
    written = folders(tmp_path)
    files(tmp_path / "photos", PIXELS[:, :1])
    with pytest.raises(DataError, match=r"a/00\.bmp and .*a/00\.png belong .* has color and all images are gray"):
        load_dataset(data(written))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"sketches has no conditioning image for .*photos/b/07\.png: the names"),
        ("surplus", r"photos has no image for .*sketches/b/99\.png and 1 other files: the names"),
        ("twice", r"b/07\.(bmp|png) and .*b/07\.(bmp|png) differ only in their extensions"),
    ],
)
def test_a_file_without_a_partner_is_named(tmp_path: Path, change: str, message: str) -> None:
    written, sketches = folders(tmp_path), tmp_path / "sketches" / "b"
    if change == "missing":
        (sketches / "07.bmp").unlink()
    for name in {"surplus": ["99.png", "aa.png"], "twice": ["07.png"]}.get(change, []):
        (sketches / name).write_bytes(png(OTHERS[0]))
    with pytest.raises(DataError, match=message):
        load_dataset(data(written))


def test_a_sample_of_a_shard_without_a_condition_is_named(tmp_path: Path) -> None:
    written = shards(tmp_path)
    with tarfile.open(tmp_path / "train-1.tar", "w") as archive:
        add(archive, "006.png", png(PIXELS[6]))
    with pytest.raises(DataError, match=r"the sample 006 in .*train-1.tar has no conditioning image \(condition.png"):
        load_dataset(data(written))
    other = shards(tmp_path, "edges.png")
    other["condition"] = {"image": "edges.png"}
    assert len(load_dataset(data(other))) == COUNT


def test_arrays_that_differ_are_named(tmp_path: Path) -> None:
    written = npy(tmp_path)
    np.save(tmp_path / "others.npy", OTHERS[:-1])
    with pytest.raises(DataError, match=r"images\.npy has 12 images and .*others\.npy 11 conditioning images"):
        load_dataset(data(written))
    np.save(tmp_path / "others.npy", OTHERS[:, :1])
    with pytest.raises(DataError, match=r"others\.npy are 1x6x8, but the images in .*images\.npy are 3x6x8"):
        load_dataset(data(written))
    np.savez(tmp_path / "images.npz", images=PIXELS)
    with pytest.raises(DataError, match=r"images\.npz has no array 'conditions' of .*; it has: images"):
        load_dataset(data({"name": "array", "path": str(tmp_path / "images.npz"), "condition": {}}))
    written["condition"] = {}
    with pytest.raises(DataError, match=r"set data\.condition\.path to the array of their conditioning images"):
        load_dataset(data(written))


def test_uint8_and_floats_make_a_pair(tmp_path: Path) -> None:
    written = npy(tmp_path)
    np.save(tmp_path / "others.npy", (OTHERS / 127.5 - 1).astype(np.float16))
    found = ImageDataset(load_dataset(data(written))).read(np.arange(2))[0]
    assert np.allclose(found[:, :3], PIXELS[:2] / 127.5 - 1, atol=1e-6)
    assert np.allclose(found[:, 3:], OTHERS[:2] / 127.5 - 1, atol=1e-3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "folder", "path": "here"}, "needs data.condition.path, the folder of conditioning images"),
        ({"name": "digits", "condition": {"path": "x"}}, "path does not apply to the data set digits"),
        ({"name": "webdataset", "path": "here", "condition": {"path": "x"}}, "path does not apply .*condition.image"),
        ({"name": "folder", "path": "here", "condition": {"image": "x"}}, "image does not apply .*data.condition.path"),
        ({"name": "json:loads", "condition": {"path": "x"}}, r"its samples must be \(image, condition\)"),
        ({"name": "array", "condition": {"path": "x", "image": "y"}}, "give one"),
        ({"name": "array", "condition": {"kind": "gray", "path": "y"}}, "path is for kind 'pairs', not 'gray'"),
    ],
)  # fmt: skip
def test_a_setting_that_would_be_ignored_is_refused(tmp_path: Path, section: Written, message: str) -> None:
    files(tmp_path / "here", PIXELS)
    given = {**section, "condition": {"kind": "pairs", **section.get("condition", {})}}
    if given.get("path"):
        given["path"] = str(tmp_path / "here")
    with pytest.raises((ConfigError, DataError), match=message):
        load_dataset(resolve({"data": given}).data)


def test_a_place_of_conditions_may_change_and_is_not_opened_for_a_stranger() -> None:
    from udddm.config.trust import DATA, reaching
    from udddm.runs.release import shareable

    trees = [{"data": {"name": "folder", "condition": {"kind": "pairs", "path": path}}} for path in ("a", "b")]
    one, two = (resolve(tree) for tree in trees)
    assert one.fingerprint() == two.fingerprint()
    assert "data.condition.path=a" in reaching(one, DATA)
    assert shareable(one)["data"]["condition"]["path"] is None and resolve(shareable(one)) is not None


@pytest.mark.parametrize(
    ("kind", "given"),
    [("folders", "sketches"), ("npz", ""), ("npy", "others.npy"), ("zarr_group", "edges"), ("shards", "")],
)
def test_inspecting_counts_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, given: str) -> None:
    written = KINDS[kind](tmp_path)
    place = str(tmp_path / given) if (tmp_path / given).exists() and given else given
    arguments = [written["path"], "--condition", *([place] if place else [])]
    assert main(["data", "inspect", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["condition_shapes"]) == (COUNT, {"3x6x8": COUNT})


def test_inspecting_names_a_damaged_conditioning_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = folders(tmp_path)
    damaged = tmp_path / "sketches" / "a" / "03.bmp"
    damaged.write_bytes(damaged.read_bytes()[:60])
    assert main(["data", "inspect", written["path"], "--condition", written["condition"]["path"]]) == 1
    said = capsys.readouterr().out
    assert "pairs: 11; shapes of the conditioning images: 3x6x8 (11)" in said and str(damaged) in said


class Named(ImageFiles):
    """Files that contain their names, in the order given."""

    def __init__(self, where: str, names: list[str]) -> None:
        self.where, self.names = where, names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.where}/{self.names[index]}"

    def relative(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        return self.names[index].encode()


def test_files_are_matched_by_name_whatever_their_order() -> None:
    images, conditions = Named("a", ["x.1.jpg", "y/2.jpg", "z.png"]), Named("b", ["z.webp", "x.1.png", "y/2.png"])
    matched = MatchedFiles(images, conditions)
    assert [matched.read(i) for i in range(3)] == [b"x.1.png", b"y/2.png", b"z.webp"]
    assert matched.name(2) == "b/z.webp" and matched.prefix(0) == b"x.1.png"


def test_lengths_of_sources_are_compared() -> None:
    from udddm.data import ArrayImages

    with pytest.raises(DataError, match="one has 12 images and two 6 conditioning images"):
        PairedImages(ArrayImages(PIXELS), ArrayImages(OTHERS[:6]), ("one", "two"))
