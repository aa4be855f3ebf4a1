"""The layout on disk: plain Zarr for other readers, and all corruption is detected and named."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from udddm.errors import CorruptChunkError, StoreError
from udddm.order import Order
from udddm.storage import open_object_store
from udddm.storage.local import LocalObjectStore
from udddm.store import Encoding
from udddm.store.encoding import Rows, StateDtype
from udddm.store.generations import Generations, generation_name, open_existing

SHAPE = (3, 4, 4)
ORDER = Order(
    seed=3, samples=47, batch_size=8, num_lanes=4, chunk_size=5, chunks_per_window=2
)  # lanes of 12, 12, 12, 11 in chunks of 5, 5, 2 or 1


def rows_of(generation: int, lane: int, chunk: int, encoding: Encoding, order: Order = ORDER) -> Rows:
    rng = np.random.default_rng((generation, lane, chunk))
    shape = (order.chunk_slots(lane, chunk), *SHAPE)
    if encoding.name in ("uint8", "bf16"):
        return rng.integers(1, 256, shape).astype(encoding.array)
    return rng.normal(size=shape).astype(encoding.array)


def fill(root: Path, generation: int, dtype: StateDtype = "fp16", lanes: range | None = None) -> Generations:
    stored = Generations(LocalObjectStore(root), ORDER, SHAPE, Encoding(dtype))
    stored.create()
    stored.begin(generation)
    for lane in lanes or range(ORDER.num_lanes):
        sums = {
            c: stored.write(generation, lane, c, rows_of(generation, lane, c, stored.encoding))
            for c in range(ORDER.num_chunks(lane))
        }
        stored.complete(generation, lane, sums)
    return stored


def reopened(root: Path, dtype: StateDtype = "fp16") -> Generations:
    return Generations(LocalObjectStore(root), ORDER, SHAPE, Encoding(dtype))


def read_all(stored: Generations, generation: int) -> None:
    for lane in range(ORDER.num_lanes):
        for chunk, expected in stored.record(generation, lane).items():
            rows = stored.read(generation, lane, chunk, expected)
            np.testing.assert_array_equal(rows, rows_of(generation, lane, chunk, stored.encoding))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "uint8"])
def test_zarr_python_reads_the_same_rows(tmp_path: Path, dtype: StateDtype) -> None:
    stored = fill(tmp_path, 12, dtype)
    array = zarr.open_group(tmp_path, mode="r")["gen-000012"]
    assert isinstance(array, zarr.Array)
    assert array.shape == (4, 12, *SHAPE)
    assert array.chunks == (1, 5, *SHAPE)
    assert array.attrs["generation"] == 12
    assert array.dtype == stored.encoding.array
    for lane in range(ORDER.num_lanes):
        wanted = np.concatenate([rows_of(12, lane, c, stored.encoding) for c in range(ORDER.num_chunks(lane))])
        np.testing.assert_array_equal(array[lane, : len(wanted)], wanted)
        assert not np.any(array[lane, len(wanted) :])
    read_all(stored, 12)


def test_zarr_python_finds_a_flipped_bit_by_its_own_checksum(tmp_path: Path) -> None:
    stored = fill(tmp_path, 1)
    path = tmp_path / stored.chunk_key(1, 0, 0)
    path.write_bytes(flipped(path.read_bytes(), 77))
    array = zarr.open_group(tmp_path, mode="r")["gen-000001"]
    assert isinstance(array, zarr.Array)
    with pytest.raises(ValueError, match="checksum"):
        array[0]


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generations 5 and 6 of one store."""
    root = tmp_path_factory.mktemp("pristine")
    fill(root, 5)
    fill(root, 6)
    return root


@pytest.fixture
def damaged(pristine: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(pristine, tmp_path / "copy")
    yield tmp_path / "copy"


@pytest.mark.parametrize("seed", range(4))
def test_every_corrupt_chunk_is_detected_and_named(damaged: Path, seed: int) -> None:
    rng = random.Random(seed)
    keys = reopened(damaged)
    for _ in range(100):
        generation, lane = rng.choice([5, 6]), rng.randrange(ORDER.num_lanes)
        chunk = rng.randrange(ORDER.num_chunks(lane))
        path = damaged / keys.chunk_key(generation, lane, chunk)
        whole = path.read_bytes()
        kind = rng.choice(["bit", "bits", "truncated", "longer", "missing", "swapped", "stale", "zeros", "resealed"])
        if kind == "bit":
            path.write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        elif kind == "bits":
            noise = bytearray(whole)
            start = rng.randrange(len(noise))
            noise[start : start + 64] = rng.randbytes(len(noise[start : start + 64]))
            if bytes(noise) == whole:
                continue
            path.write_bytes(noise)
        elif kind == "truncated":
            path.write_bytes(whole[: rng.randrange(len(whole))])
        elif kind == "longer":
            path.write_bytes(whole + rng.randbytes(rng.randrange(1, 9)))
        elif kind == "missing":
            path.unlink()
        elif kind == "swapped":
            others = [
                (x, c) for x in range(ORDER.num_lanes) for c in range(ORDER.num_chunks(x)) if (x, c) != (lane, chunk)
            ]
            path.write_bytes((damaged / keys.chunk_key(generation, *rng.choice(others))).read_bytes())
        elif kind == "stale":
            path.write_bytes((damaged / keys.chunk_key(11 - generation, lane, chunk)).read_bytes())
        elif kind == "zeros":
            path.write_bytes(bytes(len(whole)))
        else:  # different rows with a matching checksum
            body = rng.randbytes(len(whole) - 4)
            path.write_bytes(body + int(google_crc32c.value(body)).to_bytes(4, "little"))
        stored = reopened(damaged)
        with pytest.raises(CorruptChunkError) as caught:
            read_all(stored, generation)
        error = caught.value
        assert (error.generation, error.lane, error.chunk) == (generation, lane, chunk), kind
        assert f"generation {generation}, lane {lane}, chunk {chunk} is damaged" in str(error)
        assert str(path) in str(error)
        assert "run the same command again" in str(error)
        path.write_bytes(whole)
    read_all(reopened(damaged), 5)
    read_all(reopened(damaged), 6)


@pytest.mark.parametrize("seed", range(2))
def test_every_damaged_completion_record_is_detected_and_named(damaged: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(150):
        generation, lane = rng.choice([5, 6]), rng.randrange(ORDER.num_lanes)
        path = damaged / f"gen-{generation:06d}" / "complete" / f"lane-{lane:04d}.json"
        whole = path.read_bytes()
        kind = rng.choice(["bit", "truncated", "swapped", "stale", "edited", "no object"])
        if kind == "bit":
            path.write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        elif kind == "truncated":
            path.write_bytes(whole[: rng.randrange(len(whole) - 2)])
        elif kind == "swapped":
            path.write_bytes(path.with_name(f"lane-{(lane + 1) % ORDER.num_lanes:04d}.json").read_bytes())
        elif kind == "stale":
            stale = damaged / f"gen-{11 - generation:06d}" / "complete" / path.name
            path.write_bytes(stale.read_bytes())
        elif kind == "edited":
            record = json.loads(whole)
            record["checksums"][0] ^= 1
            path.write_text(json.dumps(record))
        else:
            path.write_text(rng.choice(["", "[]", "null", "7", '"text"', '{"checksums": 3}', '{"checksums": [null]}']))
        with pytest.raises(StoreError, match=rf"gen-{generation:06d}/complete/lane-{lane:04d}\.json"):
            reopened(damaged).record(generation, lane)
        path.write_bytes(whole)
    read_all(reopened(damaged), 5)


def test_a_generation_is_complete_only_with_every_lane(tmp_path: Path) -> None:
    stored = fill(tmp_path, 3, lanes=range(3))
    assert stored.complete_lanes(3) == [0, 1, 2]
    assert not stored.is_complete(3)
    with pytest.raises(StoreError, match="generation 3, lane 3 is not complete"):
        reopened(tmp_path).record(3, 3)
    fill(tmp_path, 3, lanes=range(3, 4))
    assert stored.is_complete(3)
    stored.reopen(3, 1)
    assert stored.complete_lanes(3) == [0, 2, 3]
    with pytest.raises(StoreError, match="generation 3, lane 1 is not complete"):
        stored.record(3, 1)
    assert not stored.is_complete(4)


def test_leftovers_of_interrupted_writes_are_ignored(tmp_path: Path) -> None:
    stored = fill(tmp_path, 1)
    chunk = tmp_path / stored.chunk_key(1, 0, 0)
    for place in (tmp_path / "zarr.json", chunk, tmp_path / "gen-000001/complete/lane-0000.json"):
        place.with_name(f"{place.name}.123-0.partial").write_bytes(b"half")
    (tmp_path / "gen-000009.123-0.partial").write_bytes(b"half")
    (tmp_path / "gen-000002" / "complete").mkdir(parents=True)
    (tmp_path / "gen-000002" / "complete" / "lane-0000.json.9-9.partial").write_bytes(b"half")
    again = reopened(tmp_path)
    again.create()
    read_all(again, 1)
    assert again.existing() == [1, 2]
    assert again.complete_lanes(2) == []
    assert again.is_complete(1)
    with pytest.raises(StoreError, match="not complete"):
        again.record(2, 0)


def test_a_failed_write_leaves_the_old_object_and_nothing_else(tmp_path: Path) -> None:
    objects = LocalObjectStore(tmp_path)
    objects.put("a/b", b"old")
    with pytest.raises(TypeError):
        objects.put("a/b", b"new", "no bytes")  # type: ignore[arg-type]
    assert objects.get("a/b") == b"old"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


OTHER_ORDERS = {
    "seed": Order(4, 47, 8, 4, 5, 2),
    "samples": Order(3, 48, 8, 4, 5, 2),
    "batch": Order(3, 47, 16, 4, 5, 2),
    "lanes": Order(3, 47, 8, 2, 5, 2),
    "chunk": Order(3, 47, 8, 4, 6, 2),
    "window": Order(3, 47, 8, 4, 5, 3),
}


@pytest.mark.parametrize("order", OTHER_ORDERS.values(), ids=list(OTHER_ORDERS))
def test_a_store_with_a_different_order_is_refused(tmp_path: Path, order: Order) -> None:
    fill(tmp_path, 1)
    with pytest.raises(StoreError, match=r"another run \(it differs in order\).*choose another"):
        Generations(LocalObjectStore(tmp_path), order, SHAPE, Encoding("fp16")).create()


def test_a_store_with_a_different_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with pytest.raises(StoreError, match="differs in shape"):
        Generations(LocalObjectStore(tmp_path), ORDER, (1, 4, 4), Encoding("fp16")).create()
    with pytest.raises(StoreError, match="differs in dtype"):
        Generations(LocalObjectStore(tmp_path), ORDER, SHAPE, Encoding("fp32")).create()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"attributes": {}}', '{"attributes": [1]}', "null"])
def test_a_location_without_a_store_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match=r"zarr\.json|another run"):
        reopened(tmp_path).create()
    with pytest.raises(StoreError, match=r"zarr\.json"):
        open_existing(LocalObjectStore(tmp_path))


def test_a_store_describes_itself(tmp_path: Path) -> None:
    fill(tmp_path, 5, "uint8")
    found = open_existing(LocalObjectStore(tmp_path))
    assert (found.order.fingerprint(), found.shape, found.encoding.name) == (ORDER.fingerprint(), SHAPE, "uint8")
    read_all(found, 5)
    with pytest.raises(StoreError, match="no x0-state store found"):
        open_existing(LocalObjectStore(tmp_path / "elsewhere"))


def test_an_unsupported_url_is_refused() -> None:
    with pytest.raises(StoreError, match=r"nonesuch://"):
        open_object_store("nonesuch://bucket/state")


def test_file_urls_and_other_spellings_of_a_path_are_the_same_location(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    spellings = [tmp_path / "s", f"file://{tmp_path}/s", "s", "x/../s", f"{tmp_path}/s/", tmp_path / "link" / "s"]
    assert {open_object_store(each).uri("") for each in spellings} == {str(tmp_path / "s")}


def test_ranks_that_delete_their_lanes_leave_nothing(tmp_path: Path) -> None:
    stored = fill(tmp_path, 1)
    stored.delete(1, range(2))
    stored.delete_if_empty(1)
    assert stored.complete_lanes(1) == [2, 3]
    assert stored.existing() == [1]
    stored.delete(1, range(2, 4))
    stored.delete_if_empty(1)
    assert stored.existing() == []
    assert not (tmp_path / generation_name(1)).exists()
    stored.delete(1, range(4))  # deleting again is harmless
