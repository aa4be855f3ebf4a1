"""Archives from elsewhere: what is refused by name, and that an index of a shard is used only while it is true."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.errors import DataError
from udddm.testing import image_sets
from udddm.testing.image_sets import LABELS, PIXELS, png

IMAGE = png(PIXELS[0])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "udddm" / "webdataset"


def load(name: str, path: Any, **settings: Any) -> ImageDataset:
    return ImageDataset(load_dataset(DataConfig(name=name, path=str(path), **settings)))


def read_all(name: str, path: Any, **settings: Any) -> None:
    dataset = load(name, path, **settings)
    dataset.batch(np.arange(len(dataset)))


# ZIP archives


def zip_of(path: Path, members: list[tuple[str, bytes]], *, deflate: bool = False, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = archive.compression
            archive.writestr(info, content)
    return path


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "x/../../a.png", "C:/a.png", "..\\a.png", "a\\b.png", "a\0.png", "a\n.png"]
)
def test_names_that_lead_out_of_a_zip_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = zip_of(tmp_path / "a.zip", [("0.png", IMAGE), ("X" * len(name), IMAGE)])
    path.write_bytes(path.read_bytes().replace(b"X" * len(name), name.encode()))  # zipfile would not write them
    with pytest.raises(DataError, match=r"which leads out of the archive: it is not read|name is not valid"):
        load("zip", path)
    assert sorted(os.listdir(tmp_path)) == ["a.zip"]  # noqa: PTH208


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFBLK])
def test_links_and_devices_in_a_zip_archive_are_refused(tmp_path: Path, kind: int) -> None:
    path = zip_of(tmp_path / "a.zip", [("a.png", b"/etc/passwd")], mode=kind | 0o644)
    with pytest.raises(DataError, match=r"member 'a\.png', which is a link or device"):
        load("zip", path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", [("a.png", IMAGE), ("a.png", png(PIXELS[1]))])
    with pytest.raises(DataError, match=r"two members named 'a\.png'"):
        load("zip", path)


def patched(path: Path, offset_of: bytes, field: int, value: int, width: int = 4) -> Path:
    """Changes a field of every record with a signature."""
    content = bytearray(path.read_bytes())
    at = content.find(offset_of)
    while at >= 0:
        content[at + field : at + field + width] = value.to_bytes(width, "little")
        at = content.find(offset_of, at + 4)
    path.write_bytes(content)
    return path


CENTRAL, LOCAL = b"PK\1\2", b"PK\3\4"


def test_a_declared_size_is_never_allocated(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", [("a.png", bytes(1 << 20))], deflate=True)
    patched(path, CENTRAL, 24, 0x7FFFFFFF)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.png in .* has 2147483647 bytes, more than an image file may have"):
        load("zip", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_a_member_that_expands_beyond_its_declared_size_is_cut(tmp_path: Path) -> None:
    """64 MiB of zeros that claim to be 1,000 bytes."""
    path = patched(zip_of(tmp_path / "a.zip", [("a.png", bytes(1 << 26))], deflate=True), CENTRAL, 24, 1000)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.png in .* is damaged: it has another size than the 1000 bytes"):
        load("zip", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """The trick of archives that expand to a million times their size: many members share one stream."""
    path = zip_of(tmp_path / "a.zip", [("a.png", IMAGE), ("b.png", IMAGE)])
    content = bytearray(path.read_bytes())
    second = content.rfind(CENTRAL)
    content[second + 42 : second + 46] = bytes(4)  # the offset of the first
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"members 'a\.png' and 'b\.png' overlap"):
        load("zip", path)


def test_a_directory_that_announces_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", [("a.png", IMAGE)])
    patched(path, b"PK\5\6", 12, 0xFFFFFFFF)
    with pytest.raises(DataError, match="announces a directory of 1 members and 4294967295 bytes"):
        load("zip", path)


def test_an_image_of_billions_of_pixels_is_not_decoded(tmp_path: Path) -> None:
    """A PNG file whose header announces 60,000 x 60,000 pixels."""
    header = struct.pack(">II", 60_000, 60_000) + IMAGE[24:29]
    start = IMAGE[:16] + header + zlib.crc32(b"IHDR" + header).to_bytes(4, "big")
    path = zip_of(tmp_path / "a.zip", [("a.png", start + IMAGE[33:])])
    with pytest.raises(DataError, match=r"cannot read a\.png in .* as an image .*(exceeds limit|decompression bomb)"):
        load("zip", path, size=8)


def test_encrypted_and_exotic_members_are_refused(tmp_path: Path) -> None:
    path = patched(zip_of(tmp_path / "a.zip", [("a.png", IMAGE)]), CENTRAL, 8, 1, width=2)
    with pytest.raises(DataError, match=r"a\.png in .* is encrypted"):
        load("zip", path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", IMAGE)
    with pytest.raises(DataError, match=r"a\.png in .* is compressed by method 14: pack the archive with deflate"):
        load("zip", path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-10],
        lambda content: b"",
        lambda content: b"not an archive" * 100,
        lambda content: content.replace(LOCAL, b"PK\3\5"),
        lambda content: content.replace(b"IDAT", b"IDAX"),
    ],
)
def test_a_damaged_zip_archive_is_one_error_with_its_name(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = zip_of(tmp_path / "a.zip", [("a.png", IMAGE), ("b.png", IMAGE)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.zip"):
        read_all("zip", path)


def test_names_with_dots_and_double_slashes_are_one_name(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", [("./x//b.png", IMAGE), ("x/a.png", png(PIXELS[1]))])
    assert torch.equal(load("zip", path).batch(np.arange(2))[0][1], torch.from_numpy(PIXELS[0]).float() / 127.5 - 1)
    path = zip_of(tmp_path / "b.zip", [("./x//b.png", IMAGE), ("x/b.png", IMAGE)])
    with pytest.raises(DataError, match=r"two members named 'x/b\.png'"):
        load("zip", path)


def test_a_changed_pixel_is_found_by_the_checksum_of_the_archive(tmp_path: Path) -> None:
    """BMP files have no checksum of their own."""
    file = io.BytesIO()
    Image.fromarray(PIXELS[0].transpose(1, 2, 0)).save(file, format="BMP")
    path = zip_of(tmp_path / "a.zip", [("a.bmp", file.getvalue())])
    content = path.read_bytes()
    path.write_bytes(_flip(content, content.find(file.getvalue()) + len(file.getvalue()) - 5))
    with pytest.raises(DataError, match=r"a\.bmp in .* is damaged: its checksum is wrong"):
        read_all("zip", path)


def test_every_byte_of_a_zip_archive_may_be_wrong(tmp_path: Path) -> None:
    """Any change of one byte gives the right images or a DataError, never another exception."""
    path = Path(image_sets.zip_archive(str(tmp_path), PIXELS[:3], LABELS[:3]))
    content, generator = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for at in generator.choice(len(content), 200, replace=False).tolist():
        damaged = bytearray(content)
        damaged[at] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            images, _ = load("zip", path).batch(np.arange(3))
        except (DataError, IndexError):  # a name that no longer ends in .png
            outcomes.add("refused")
        else:
            assert torch.equal(images, torch.from_numpy(PIXELS[:3]).float() / 127.5 - 1)
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


# tar shards


def tar_of(path: Path, members: list[tuple[Any, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for given, content in members:
            info = given if isinstance(given, tarfile.TarInfo) else tarfile.TarInfo(given)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(kind: bytes, name: str = "a.png", link: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "a\\b.png", "x" * 5000 + ".png"])
def test_names_that_lead_out_of_a_shard_are_refused(tmp_path: Path, name: str) -> None:
    path = tar_of(tmp_path / "a.tar", [(name, IMAGE)])
    with pytest.raises(DataError, match=r"which leads out of the archive: it is not read|name is not valid"):
        load("webdataset", path)
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]  # noqa: PTH208


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_devices_and_sparse_files_in_a_shard_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tar_of(tmp_path / "a.tar", [("0.png", IMAGE), (special(kind), b"")])
    with pytest.raises(DataError, match=r"member 'a\.png', which is a link or device"):
        load("webdataset", path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 8 << 30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    os.truncate(path, 9 << 30)  # as much as it says, though not on the disk
    with pytest.raises(DataError, match="has a header of 8589934592 bytes"):
        load("webdataset", path)


def test_a_chain_of_headers_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3
    path = tmp_path / "a.tar"
    path.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"a.b".ljust(512, b"\0")) * 5000 + bytes(1024))
    with pytest.raises(DataError, match=r"cannot read .*a\.tar as an uncompressed tar archive"):
        load("webdataset", path)


def test_a_member_larger_than_an_image_may_be_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf())
    os.truncate(path, 2 << 30)
    with pytest.raises(DataError, match=r"a\.png in .* announces 1073741824 bytes"):
        load("webdataset", path)


def test_ambiguous_shards_are_refused(tmp_path: Path) -> None:
    for members, message in (
        ([("a.png", IMAGE), ("a.png", IMAGE)], r"two members named 'a\.png'"),
        ([("a.png", IMAGE), ("b.png", IMAGE), ("a.png", IMAGE)], "two samples named 'a'"),
        ([("a.png", IMAGE), ("a.jpg", IMAGE)], r"sample a in .* has several images \(png, jpg\): set data\.image"),
        ([("a.txt", b"x")], r"sample a in .* has no image \(png, jpg, jpeg, webp\); it has: txt"),
        ([("a.png", IMAGE), ("a.cls", b"3"), ("b.png", IMAGE)], r"sample b in .* has no cls, its label"),
        (
            [("a.png", IMAGE), ("b.png", IMAGE), ("b.cls", b"3")],
            r"b in .* has a label \(cls\), but the first one has none",
        ),
        ([("a.png", IMAGE), ("a.cls", b"cat")], r"the cls of the sample a in .* cannot be read"),
        ([("a.png", IMAGE), ("a.cls", b"-1")], r"the cls of the sample a in .* is '-1': labels are integers >= 0"),
        ([("a.png", IMAGE), ("a.cls", b"[" * 100_000)], "the cls of the sample a in .* cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            load("webdataset", tar_of(tmp_path / "a.tar", members))


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_a_compressed_shard_is_refused(tmp_path: Path, mode: Any) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.addfile(special(tarfile.REGTYPE), io.BytesIO())
    with pytest.raises(DataError, match="as an uncompressed tar archive"):
        load("webdataset", tmp_path / "a.tar")


def test_a_truncated_or_damaged_shard_does_not_lose_samples_silently(tmp_path: Path) -> None:
    image_sets.shards(str(tmp_path), each=40)
    path = tmp_path / "shards-000.tar"
    content = path.read_bytes()
    middle = content.find(b"000020.")
    ends = (middle + 50, middle + 512, middle + 520)
    for damaged in (*(content[:end] for end in ends), _flip(content, middle + 3)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shards-000\.tar"):
            load("webdataset", path)


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_shards_without_an_end_are_read(tmp_path: Path) -> None:
    """Some writers leave the two blocks of zeros out."""
    path = tar_of(tmp_path / "a.tar", [("a.png", IMAGE), ("b.png", IMAGE)], format=tarfile.PAX_FORMAT)
    with tarfile.open(path) as archive:
        list(archive)
        end = archive.offset
    path.write_bytes(path.read_bytes()[:end])
    assert len(load("webdataset", path)) == 2


def test_directories_and_metadata_in_a_shard_are_skipped(tmp_path: Path) -> None:
    names: list[tuple[Any, bytes]] = [
        (special(tarfile.DIRTYPE, "./x"), b""),
        ("README", b"text"),
        ("x/._a.png", b"mac"),
    ]
    path = tar_of(tmp_path / "a.tar", [*names, ("x/a.png", IMAGE), ("x/a.cls", b"2\n")])
    dataset = load("webdataset", path)
    assert len(dataset) == 1 and dataset.batch(np.arange(1))[1].tolist() == [2]  # type: ignore[union-attr]


@pytest.mark.parametrize("label", ["cls", "json.class"])
def test_labels_are_found_or_named(tmp_path: Path, label: str) -> None:
    path = image_sets.shards(str(tmp_path))
    for given in (None, label):
        labels = load("webdataset", path, label=given).batch(np.arange(40))[1]
        assert labels is not None and (labels == LABELS).all()


def test_the_image_of_a_sample_is_named(tmp_path: Path) -> None:
    members = [("a.image.png", IMAGE), ("a.mask.png", png(PIXELS[1])), ("b.image.png", IMAGE), ("b.mask.png", IMAGE)]
    path = tar_of(tmp_path / "a.tar", members)
    images, _ = load("webdataset", path, image="mask.png").batch(np.arange(2))
    assert torch.equal(images, torch.from_numpy(PIXELS[[1, 0]]).float() / 127.5 - 1)


# the index


def test_the_index_is_built_once_and_again_when_the_shard_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = image_sets.shards(str(tmp_path), each=40)

    def built() -> int:
        caplog.clear()
        dataset = load("webdataset", path)
        dataset.batch(np.arange(len(dataset)))
        return sum("building the index" in record.message for record in caplog.records)

    assert [built(), built()] == [1, 0]
    image_sets.shards(str(tmp_path), PIXELS[::-1], LABELS, each=40)  # the same size, another time
    assert built() == 1
    assert torch.equal(
        load("webdataset", path).batch(np.arange(1))[0][0], torch.from_numpy(PIXELS[-1]).float() / 127.5 - 1
    )
    index = tmp_path / "shards-000.tar.index.json"
    for content in (b"", b"{", b"[]", b'{"identity": 3}', index.read_bytes()[:-20]):
        index.write_bytes(content)
        assert [built(), built()] == [1, 0]


def test_an_index_that_points_beyond_the_shard_is_not_used(tmp_path: Path) -> None:
    path = image_sets.shards(str(tmp_path), each=40)
    load("webdataset", path)
    index = tmp_path / "shards-000.tar.index.json"
    found = json.loads(index.read_text())
    found["samples"][3][1] = 1 << 40
    index.write_text(json.dumps(found))
    read_all("webdataset", path)


def test_the_index_of_a_read_only_directory_is_in_the_cache(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "shards").mkdir()
    path = image_sets.shards(str(tmp_path / "shards"), each=40)
    blocked = tmp_path / "shards" / "shards-000.tar.index.json"
    blocked.mkdir()  # as good as a directory without write permission, also for root
    read_all("webdataset", path)
    assert len(list(cache.iterdir())) == 1 and not list(blocked.iterdir())
    assert not list((tmp_path / "shards").glob("*.partial"))


def test_the_index_of_remote_shards_is_in_the_cache(cache: Path) -> None:
    path = image_sets.shards(f"memory://index-{os.getpid()}", each=40)
    read_all("webdataset", path)
    assert len(list(cache.iterdir())) == 1


def test_a_shard_that_is_replaced_during_a_run_is_an_error(tmp_path: Path) -> None:
    path = image_sets.shards(str(tmp_path), each=40)
    dataset = load("webdataset", path)
    os.truncate(tmp_path / "shards-000.tar", 4096)
    with pytest.raises(DataError, match=r"shards-000\.tar has .* bytes at .* truncated or was replaced"):
        dataset.batch(np.arange(40))


def test_an_image_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("a.png", IMAGE), ("b.png", b"no image")])
    with pytest.raises(DataError, match=r"cannot read b\.png in .*a\.tar as an image"):
        load("webdataset", path)


def test_shards_of_a_directory_are_in_order(tmp_path: Path) -> None:
    image_sets.shards(str(tmp_path))
    images, _ = load("webdataset", tmp_path).batch(np.arange(40))
    assert torch.equal(images, torch.from_numpy(PIXELS).float() / 127.5 - 1)
    with pytest.raises(DataError, match=r"shards-003\.tar and 5 others does not exist"):
        load("webdataset", tmp_path / "shards-{000..008}.tar")
    with pytest.raises(DataError, match=r"numbers in \{5\.\.1\} must rise"):
        load("webdataset", tmp_path / "shards-{5..1}.tar")


def test_the_index_agrees_with_webdataset(tmp_path: Path) -> None:
    """The samples, their order and their labels are those that the package itself reads."""
    path = image_sets.shards(str(tmp_path))
    code = (
        "import sys, json, webdataset\n"
        "samples = webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode('rgb8')\n"
        "print(json.dumps([[sample['cls'], sample['png'].tolist()] for sample in samples]))"
    )
    printed = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    samples = json.loads(printed)
    images, labels = load("webdataset", path).batch(np.arange(40))
    assert labels is not None and [label for label, _ in samples] == labels.tolist()
    theirs = np.array([pixels for _, pixels in samples]).transpose(0, 3, 1, 2)
    assert np.array_equal(((images.numpy() + 1) * 127.5).round().astype(np.uint8), theirs)
