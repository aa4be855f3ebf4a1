"""Compressed chunks: lossless, readable by Zarr, corruption is detected, and a generation keeps its compression."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from udddm.config import StoreConfig
from udddm.errors import CorruptChunkError
from udddm.order import Order
from udddm.runs.run import Run
from udddm.storage.local import LocalObjectStore
from udddm.store import Encoding, X0Store, build
from udddm.store.compression import Compression, compress, decompress
from udddm.store.encoding import StateDtype
from udddm.store.generations import Generations
from udddm.store.layout import StateLayout
from udddm.testing.store import SHAPE, ModelledRun

ORDER = Order(seed=5, samples=61, batch_size=8, num_lanes=2, chunk_size=4, chunks_per_window=2)


def make_with(compression: str, order: Order, lanes: range, encoding: Encoding, directory: Path) -> X0Store:
    config = StoreConfig.model_validate({"kind": "zarr", "compression": compression, "dtype": encoding.name})
    return build(
        Run(directory).store_context(
            StateLayout(order, lanes, SHAPE, Encoding(config.dtype), torch.device("cpu")), config
        )
    )


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@given(
    rows=st.sampled_from(["<f4", "<f2", "<u2", "u1"]).flatmap(
        lambda dtype: arrays.arrays(np.dtype(dtype), st.tuples(st.integers(1, 9), st.integers(1, 40)))
    )
)
@settings(max_examples=50, deadline=None)
def test_compression_round_trip(compression: Compression, rows: np.ndarray) -> None:
    assert bytes(decompress(memoryview(compress(rows, compression)), compression)) == rows.tobytes()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "uint8"])
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_zarr_reads_compressed_chunks_and_corruption_is_named(
    tmp_path: Path, compression: Compression, dtype: StateDtype
) -> None:
    encoding = Encoding(dtype)
    stored = Generations(LocalObjectStore(tmp_path), ORDER, SHAPE, encoding, compression=compression)
    stored.create()
    stored.begin(1)
    values = torch.linspace(-1, 1, ORDER.chunk_size * int(np.prod(SHAPE))).reshape(ORDER.chunk_size, *SHAPE)
    rows = encoding.to_array(encoding.encode(values))
    checksum = stored.write(1, 1, 2, rows)
    found = zarr.open(str(tmp_path), mode="r")["gen-000001"][1, 2 * ORDER.chunk_size : 3 * ORDER.chunk_size]
    np.testing.assert_array_equal(found, rows)
    fresh = Generations(LocalObjectStore(tmp_path), ORDER, SHAPE, encoding)  # reads the compression from zarr.json
    np.testing.assert_array_equal(fresh.read(1, 1, 2, checksum), rows)
    path = tmp_path / stored.chunk_key(1, 1, 2)
    whole = path.read_bytes()
    assert compression == "none" or len(whole) != len(rows.tobytes()) + 4
    for damaged in (whole[:-1], whole[:2], b"", whole[:5] + bytes([whole[5] ^ 4]) + whole[6:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptChunkError, match="lane 1, chunk 2"):
            fresh.read(1, 1, 2, checksum)


def test_compression_may_change_between_starts_and_an_existing_generation_keeps_its_own(tmp_path: Path) -> None:
    chosen = "zstd"

    def make(order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        return make_with(chosen, order, lanes, encoding, directory)

    def codecs(generation: int) -> list[str]:
        text = (tmp_path / "state" / f"gen-{generation:06d}" / "zarr.json").read_text()
        return [each["name"] for each in json.loads(text)["codecs"]]

    run = ModelledRun(make, ORDER, Encoding("fp16"), tmp_path)
    run.start()
    run.advance(ORDER.steps_per_epoch + ORDER.steps_per_epoch // 2)  # generation 2 has been started
    saved = run.save()
    chosen = "none"
    run.restart(saved)
    run.advance(ORDER.steps_per_epoch)
    run.check_rows()
    run.save()
    assert "blosc" in codecs(2) and "blosc" not in codecs(3)
    run.crash()
