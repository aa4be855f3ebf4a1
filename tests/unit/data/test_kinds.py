"""Every kind of data set gives the same images and labels in the same order, from a path and from URLs."""

from __future__ import annotations

import http.server
import os
import pickle
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from udddm.config import DataConfig
from udddm.data import ImageDataset, access, load_dataset
from udddm.data.reading import ProcessReader
from udddm.errors import ConfigError, DataError
from udddm.testing import image_sets
from udddm.testing.image_sets import ANYWHERE, LABELS, LOCAL, NAMES, PIXELS
from udddm.testing.s3 import BUCKET, S3Server
from udddm.tools.dataset.latents import open_autoencoder

EXPECTED = torch.from_numpy(PIXELS).float() / 127.5 - 1
SHUFFLED = np.random.default_rng(1).permutation(len(PIXELS))


def load(name: str, path: str, **settings: Any) -> ImageDataset:
    return ImageDataset(load_dataset(DataConfig(name=name, path=path, **settings)))


def check(dataset: ImageDataset) -> None:
    images, labels = dataset.batch(SHUFFLED)
    assert torch.equal(images, EXPECTED[SHUFFLED])
    assert labels is not None and (labels == LABELS[SHUFFLED]).all()
    assert dataset.classes == 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices of remote shards and the tables of Parquet files are kept."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", LOCAL)
def test_every_kind_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    name, write = LOCAL[kind]
    check(load(name, write(str(tmp_path))))


@pytest.mark.parametrize("kind", [kind for kind in LOCAL if kind != "npz"])
def test_processes_read_the_same_samples(tmp_path: Path, kind: str) -> None:
    """A copy opens the files again, in another process."""
    name, write = LOCAL[kind]
    dataset = load(name, write(str(tmp_path)))
    dataset.batch(SHUFFLED)  # files are open
    check(pickle.loads(pickle.dumps(dataset)))


def test_worker_processes_and_forks_read_shards(tmp_path: Path) -> None:
    dataset = load("webdataset", image_sets.shards(str(tmp_path)))
    dataset.batch(SHUFFLED)
    child = os.fork()  # shares the open files
    for _ in range(20):
        same = torch.equal(dataset.batch(SHUFFLED)[0], EXPECTED[SHUFFLED])
    if child == 0:
        os._exit(0 if same else 1)
    assert same and os.waitpid(child, 0)[1] == 0
    reader = ProcessReader(dataset, 2)
    try:
        images, _ = reader.request(SHUFFLED)(SHUFFLED)
        assert torch.equal(images, EXPECTED[SHUFFLED])
    finally:
        reader.close()


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files of a directory, with range requests, which Python's own server ignores."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        path = Path(self.translate_path(self.path))
        if not wanted.startswith("bytes=") or not path.is_file():
            super().do_GET()
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        content = path.read_bytes()
        start, stop = int(first or 0), min(int(last or len(content)), len(content) - 1) + 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory, and the URL of its server."""
    (tmp_path / "www").mkdir()
    handler = partial(Ranges, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("kind", ANYWHERE)
@pytest.mark.parametrize("scheme", ["file", "memory", "http"])
def test_urls_give_the_same_samples(tmp_path: Path, kind: str, scheme: str, website: tuple[Path, str]) -> None:
    name, write = ANYWHERE[kind]
    if scheme == "http":
        path = write(str(website[0])).replace(str(website[0]), website[1])
    else:
        path = write(f"file://{tmp_path}/x" if scheme == "file" else f"memory://{uuid.uuid4().hex}")
    check(load(name, path))


def test_a_server_without_range_requests_is_one_error(
    website: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranges, "do_GET", http.server.SimpleHTTPRequestHandler.do_GET)
    image_sets.zip_archive(str(website[0]))
    with pytest.raises(DataError, match="does not support range requests: download the file"):
        check(load("zip", f"{website[1]}/images.zip"))


@pytest.mark.parametrize("kind", ANYWHERE)
def test_s3_gives_the_same_samples(s3: S3Server, kind: str) -> None:
    name, write = ANYWHERE[kind]
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    check(load(name, write(f"s3://{BUCKET}/{uuid.uuid4().hex}")))


@pytest.mark.parametrize("kind", ANYWHERE)
def test_a_url_without_data_is_one_error(kind: str) -> None:
    with pytest.raises(DataError, match=r"nothing exists at memory://nowhere|contains no shards"):
        load(ANYWHERE[kind][0], "memory://nowhere/x")


@pytest.mark.parametrize("kind", ["folder", "zip", "webdataset", "save_to_disk"])
def test_images_of_other_sizes_are_resized_alike(tmp_path: Path, kind: str) -> None:
    """`data.size` gives the pixels of the folder for every kind."""
    name, write = LOCAL[kind]
    images = load(name, write(str(tmp_path)), size=4).batch(SHUFFLED)[0]
    if kind == "folder":
        expected = Image.fromarray(PIXELS[SHUFFLED[0]].transpose(1, 2, 0)).resize((4, 4), Image.Resampling.LANCZOS)
        assert np.array_equal(((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), np.asarray(expected))
    (tmp_path / "f").mkdir()
    assert torch.equal(images, load("folder", image_sets.folder(str(tmp_path / "f")), size=4).batch(SHUFFLED)[0])


def test_names_of_classes_are_kept(tmp_path: Path) -> None:
    assert load("huggingface", image_sets.saved(str(tmp_path))).class_names == NAMES
    assert load("huggingface", image_sets.parquet(str(tmp_path))).class_names == NAMES


def test_gray_images_have_one_channel_in_every_kind(tmp_path: Path) -> None:
    pixels, labels = PIXELS[:, :1], LABELS
    for write, name in (
        (image_sets.zip_archive, "zip"),
        (image_sets.shards, "webdataset"),
        (image_sets.saved, "huggingface"),
    ):
        images, _ = load(name, write(str(tmp_path), pixels, labels)).batch(SHUFFLED)
        assert torch.equal(images, EXPECTED[SHUFFLED][:, :1])


def test_a_dataset_object_is_a_data_set() -> None:
    import datasets

    rows = image_sets.rows()
    check(ImageDataset(rows))
    check(ImageDataset(rows.with_format("torch")))  # formats concern its own users
    with pytest.raises(DataError, match=r"DatasetDict: give one of its splits \(train\)"):
        ImageDataset(datasets.DatasetDict({"train": rows}))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="IterableDataset, which has no random access"):
        ImageDataset(rows.to_iterable_dataset())  # type: ignore[arg-type]


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_sets.saved(str(tmp_path))
    for name in ("datasets", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs Hugging Face datasets: pip install 'udddm\[hf\]'"):
        load("huggingface", path)
    with pytest.raises(ConfigError, match=r"needs diffusers: pip install 'udddm\[autoencoder\]'"):
        open_autoencoder(tmp_path, "cpu")


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    import datasets

    rows = image_sets.rows().rename_columns({"image": "photo", "label": "species"})
    rows.save_to_disk(str(tmp_path / "one"))
    check(load("huggingface", str(tmp_path / "one")))
    check(load("huggingface", str(tmp_path / "one"), image="photo", label="species"))
    mask = rows.select_columns(["photo"]).rename_column("photo", "mask")
    two = datasets.concatenate_datasets([rows.add_column("other", [3] * len(rows)), mask], axis=1)
    two.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"data\.image must name the images; the columns are photo \(Image\)"):
        load("huggingface", str(tmp_path / "two"))
    check(load("huggingface", str(tmp_path / "two"), image="photo"))
    with pytest.raises(DataError, match=r"data\.image=other is not one of images"):
        load("huggingface", str(tmp_path / "two"), image="other")
    with pytest.raises(DataError, match=r"no column data\.label=kind; the columns are photo, species"):
        load("huggingface", str(tmp_path / "two"), image="photo", label="kind")


def test_splits_are_named(tmp_path: Path) -> None:
    import datasets

    rows = image_sets.rows()
    datasets.DatasetDict({"train": rows, "test": rows.select(range(7))}).save_to_disk(str(tmp_path / "d"))
    check(load("huggingface", str(tmp_path / "d")))
    assert len(load("huggingface", str(tmp_path / "d"), split="test")) == 7
    with pytest.raises(DataError, match=r"splits train, test: set data\.split to one of them"):
        load("huggingface", str(tmp_path / "d"), split="valid")
    rows.save_to_disk(str(tmp_path / "s"))
    with pytest.raises(DataError, match="without splits"):
        load("huggingface", str(tmp_path / "s"), split="test")


def test_rows_that_refer_to_files_are_refused(tmp_path: Path) -> None:
    """A table from elsewhere must not make this machine open its files."""
    import datasets
    import pyarrow.parquet

    secret = tmp_path / "private.png"
    secret.write_bytes(image_sets.png(PIXELS[0]))
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(secret)}] * 2}, features=features)
    pyarrow.parquet.write_table(rows.data.table, tmp_path / "x.parquet")  # to_parquet would embed the file
    with pytest.raises(DataError, match=r"row 0 of .*refers to .*private\.png instead of containing its image"):
        load("huggingface", str(tmp_path / "x.parquet"))
    assert torch.equal(ImageDataset(rows).batch(np.arange(2))[0][1], EXPECTED[0])  # an object of this program's


def test_a_saved_folder_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    place = Path(image_sets.saved(str(tmp_path)))
    shutil.copy(next(place.glob("*.arrow")), tmp_path / "elsewhere.arrow")
    state = (place / "state.json").read_text()
    name = next(place.glob("*.arrow")).name
    (place / "state.json").write_text(state.replace(name, "../elsewhere.arrow"))
    with pytest.raises(DataError, match=r"names the file '\.\./elsewhere\.arrow' outside of its folder"):
        load("huggingface", str(place))


def test_files_that_start_programs_are_not_decoded(tmp_path: Path) -> None:
    """Pillow runs Ghostscript for EPS, whatever the name of a file."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DataError, match=r"cannot read .*a\.png as an image"):
        load("folder", str(tmp_path / "f"))


def test_an_open_file_limit_is_respected(tmp_path: Path) -> None:
    path = image_sets.shards(str(tmp_path), each=1)
    dataset = load("webdataset", path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    check(dataset)
    assert len(os.listdir("/proc/self/fd")) - before <= access.OPEN_FILES  # noqa: PTH208
