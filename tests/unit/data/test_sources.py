"""Digits, Fashion-MNIST and CIFAR-10: the right arrays, and errors for corrupt files."""

import gzip
import hashlib
import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.data.sources import (
    CIFAR10_BATCHES,
    CIFAR10_FOLDER,
    FASHION_DEBIAN,
    FASHION_IMAGES,
    FASHION_LABELS,
    IdxFile,
    Remote,
    cifar10,
    fashion_mnist,
)
from udddm.errors import DataError

RNG = np.random.default_rng(0)


def test_digits_equal_those_of_scikit_learn() -> None:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    dataset = ImageDataset(load_dataset(DataConfig(name="digits")))
    images, labels = dataset.batch(np.arange(1797))
    assert (len(dataset), dataset.shape, dataset.classes) == (1797, (1, 8, 8), 10)
    assert torch.equal(images, torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1)
    assert np.array_equal(labels, bunch.target)


def test_digits_have_the_fingerprint_of_runs_that_read_them_from_scikit_learn() -> None:
    found = ImageDataset(load_dataset(DataConfig(name="digits"))).fingerprint()
    assert {key: value for key, value in found.items() if key != "content"} == {  # which those runs did not record
        "length": 1797,
        "shape": [1, 8, 8],
        "digest": "1d4ede123df27d0f64ff65055a24ebe358b648525092b89a3a560a3646c8cac3",
    }


@pytest.mark.skipif(
    not (FASHION_DEBIAN / FASHION_IMAGES.name).is_file(), reason="needs the Debian package dataset-fashion-mnist"
)
def test_fashion_mnist_of_debian_is_the_official_one() -> None:
    dataset = ImageDataset(load_dataset(DataConfig(name="fashion-mnist")))
    assert (len(dataset), dataset.shape, dataset.classes) == (60_000, (1, 28, 28), 10)
    images, labels = dataset.batch(np.arange(60_000))
    assert (images.min(), images.max()) == (-1, 1)
    assert labels is not None and np.bincount(labels).tolist() == [6000] * 10
    # The mean commonly used to normalize this data set is 0.2860 of 255.
    assert float(images.mean()) == pytest.approx(2 * 0.2860 - 1, abs=2e-4)


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = RNG.integers(0, 256, (12, 5, 4), dtype=np.uint8)
LABELS = (np.arange(12) % 10).astype(np.uint8)


def small(array: np.ndarray, name: str, url: str = "http://127.0.0.1:1/") -> tuple[IdxFile, bytes]:
    packed = gzip.compress(idx(array))
    remote = Remote(url + name, hashlib.md5(packed).hexdigest())
    return IdxFile(name, array.shape, zlib.crc32(idx(array)), remote), packed


IMAGE_FILE, PACKED_IMAGES = small(IMAGES, "images.gz")
LABEL_FILE, PACKED_LABELS = small(LABELS, "labels.gz")


def small_fashion(path: Path | None, system: Path = Path("/nowhere")) -> ImageDataset:
    return ImageDataset(fashion_mnist(path, images=IMAGE_FILE, labels=LABEL_FILE, system=system))


def test_fashion_mnist_is_read_from_the_path_the_system_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "udddm" / "fashion-mnist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match=r"downloading http://127\.0\.0\.1:1/images\.gz failed"):
        small_fashion(None)
    for place in (tmp_path / "named", tmp_path / "system", cache):
        place.mkdir(parents=True, exist_ok=True)
        (place / "images.gz").write_bytes(PACKED_IMAGES)
        (place / "labels.gz").write_bytes(PACKED_LABELS)
    for dataset in (small_fashion(tmp_path / "named"), small_fashion(None, tmp_path / "system"), small_fashion(None)):
        images, labels = dataset.batch(np.arange(12))
        assert torch.equal(images, torch.from_numpy(IMAGES[:, None]).float() / 127.5 - 1)
        assert np.array_equal(labels, LABELS)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "no gzip": (b"hello", "as a gzip file"),
    "truncated gzip": (PACKED_IMAGES[:-20], "as a gzip file"),
    "flipped bit": (
        PACKED_IMAGES[:-6] + bytes([PACKED_IMAGES[-6] ^ 1]) + PACKED_IMAGES[-5:],
        "as a gzip",
    ),
    "empty": (gzip.compress(b""), "not an IDX file of uint8: it starts with nothing"),
    "floats": (gzip.compress(b"\0\0\x0d\x03" + idx(IMAGES)[4:]), "not an IDX file of uint8: it starts with 00 00 0d"),
    "short header": (gzip.compress(idx(IMAGES)[:9]), "ends within its IDX header"),
    "short data": (gzip.compress(idx(IMAGES)[:-1]), r"contains 239 bytes of data, but .* \[12, 5, 4\]: 240"),
    "long data": (gzip.compress(idx(IMAGES) + b"\0"), "contains 241 bytes"),
    "other shape": (gzip.compress(idx(IMAGES[:, :4])), r"contains an array of shape \[12, 4, 4\], not \[12, 5, 4\]"),
    "other data set": (gzip.compress(idx(255 - IMAGES)), "the wrong contents: does it belong to another data set"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_corrupt_idx_file_is_named(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGED[damage]
    (tmp_path / "images.gz").write_bytes(content)
    (tmp_path / "labels.gz").write_bytes(PACKED_LABELS)
    with pytest.raises(DataError, match=rf"images\.gz .*{message}"):
        small_fashion(tmp_path)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "images.gz").write_bytes(PACKED_IMAGES)
    with pytest.raises(DataError, match=r"labels\.gz does not exist"):
        small_fashion(tmp_path)


def test_the_official_files_are_the_training_split() -> None:
    for file in (FASHION_IMAGES, FASHION_LABELS):
        assert file.name.startswith("train-") and file.shape[0] == 60_000 and file.remote.url.endswith(file.name)


PIXELS = RNG.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)  # five batches of two records
CIFAR_LABELS = np.arange(10, dtype=np.uint8)[::-1].copy()


def batches() -> dict[str, bytes]:
    records = np.concatenate([CIFAR_LABELS[:, None], PIXELS.reshape(10, -1)], axis=1)
    return {name: records[2 * i : 2 * i + 2].tobytes() for i, name in enumerate(CIFAR10_BATCHES)}


def pack(path: Path, members: dict[str, Any]) -> Remote:
    """An archive of members, each given as contents or as (type, link target)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return Remote("http://127.0.0.1:1/cifar.tar.gz", hashlib.md5(path.read_bytes()).hexdigest())


def members(prefix: str = f"{CIFAR10_FOLDER}/") -> dict[str, Any]:
    others = {"readme.html": b"read me", "test_batch.bin": b"not read"}
    return {prefix + name: content for name, content in {**others, **dict(reversed(batches().items()))}.items()}


def check_small_cifar(dataset: ImageDataset) -> None:
    images, labels = dataset.batch(np.arange(10))
    assert torch.equal(images, torch.from_numpy(PIXELS).float() / 127.5 - 1)
    assert np.array_equal(labels, CIFAR_LABELS)
    assert (dataset.shape, dataset.classes) == ((3, 32, 32), 10)


@pytest.mark.parametrize("prefix", ["", "./"])
def test_cifar10_from_its_archive(tmp_path: Path, prefix: str) -> None:
    remote = pack(tmp_path / "cifar.tar.gz", members(f"{prefix}{CIFAR10_FOLDER}/"))
    check_small_cifar(ImageDataset(cifar10(tmp_path / "cifar.tar.gz", remote=remote, records=2)))
    assert [file.name for file in tmp_path.iterdir()] == ["cifar.tar.gz"]  # nothing was unpacked


def test_cifar10_from_its_directory(tmp_path: Path) -> None:
    for name, content in batches().items():
        (tmp_path / name).write_bytes(content)
    check_small_cifar(ImageDataset(cifar10(tmp_path, records=2)))
    (tmp_path / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"data_batch_3\.bin has 5 bytes, but a CIFAR-10 batch has 6146"):
        cifar10(tmp_path, records=2)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin does not exist: .* is not a complete cifar-10-batches-bin"):
        cifar10(tmp_path, records=2)


def test_cifar10_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "udddm").mkdir()
    remote = pack(tmp_path / "udddm" / "cifar-10-binary.tar.gz", members())
    check_small_cifar(ImageDataset(cifar10(remote=remote, records=2)))


def test_a_wrong_archive_is_reported_with_both_checksums_and_a_remedy(tmp_path: Path) -> None:
    remote = pack(tmp_path / "cifar.tar.gz", members())
    with pytest.raises(
        DataError, match=f"has the MD5 {remote.md5}, but .* has c32a1d4ab5d03f1284b67883e8d87530: .*unpack"
    ):
        load_dataset(DataConfig(name="cifar10", path=str(tmp_path / "cifar.tar.gz")))


ARCHIVES: dict[str, tuple[dict[str, Any], str]] = {
    "python version": (
        {"cifar-10-batches-py/data_batch_1": b"x"},
        "does not contain .*data_batch_1.bin: .* binary version",
    ),
    "missing batch": ({k: v for k, v in members().items() if "batch_4" not in k}, r"not contain .*data_batch_4\.bin"),
    "elsewhere": (members("../../evil/"), "does not contain"),
    "link": (
        {**members(), f"{CIFAR10_FOLDER}/data_batch_2.bin": (tarfile.SYMTYPE, "/etc/passwd")},
        r"data_batch_2\.bin",
    ),
    "short": ({**members(), f"{CIFAR10_FOLDER}/data_batch_2.bin": b"x"}, r"data_batch_2\.bin in .* has 1 bytes"),
    "label": (
        {**members(), f"{CIFAR10_FOLDER}/data_batch_5.bin": bytes(3073) + b"\x0a" + bytes(3072)},
        r"data_batch_5\.bin in .* has the label 10 in record 1",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_of_wrong_structure_is_reported(tmp_path: Path, case: str) -> None:
    contents, message = ARCHIVES[case]
    remote = pack(tmp_path / "cifar.tar.gz", contents)
    with pytest.raises(DataError, match=message):
        cifar10(tmp_path / "cifar.tar.gz", remote=remote, records=2)


@pytest.mark.parametrize("keep", [0, 100, 15_000, -1])
def test_a_truncated_archive_is_reported_even_if_its_checksum_matches(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cifar.tar.gz"
    pack(path, members())
    path.write_bytes(path.read_bytes()[:keep])
    remote = Remote("http://127.0.0.1:1/", hashlib.md5(path.read_bytes()).hexdigest())
    try:
        dataset = cifar10(path, remote=remote, records=2)
    except DataError as error:
        assert str(path) in str(error)
    else:  # the truncation is after the last batch
        assert keep == -1
        check_small_cifar(ImageDataset(dataset))


def test_a_missing_archive_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist: give cifar-10-binary\.tar\.gz or the directory"):
        cifar10(tmp_path / "nowhere")
