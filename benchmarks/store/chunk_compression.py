"""Gain and cost of compressing the chunks of the x0-state, by dtype, on states of a real run.

    python benchmarks/store/chunk_compression.py --json benchmarks/results/compression.json

Trains a chain on the digits for some steps, takes the newest generation of its x0-state (1,797 x 1 x 8 x 8), converts
it to each dtype, and compresses it like the store (`store.compression`: blosc with byte shuffle; bit shuffle for uint8)
on one thread. "noise" is generation 0, which is never stored: a lower bound of the gain. MB/s refer to uncompressed
bytes and are medians of 20 rounds in which the codecs take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

import udddm
from udddm.store.compression import Compression, compress, decompress
from udddm.store.encoding import Encoding, Rows, StateDtype, generation_zero
from udddm.tools.inspect import find

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

ROUNDS = 20


def states(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The newest generation of a digits run of `steps` steps, and its generation 0: float32 [N, 1, 8, 8]."""
    overrides = [
        "objective={name: chain, huber_c: 1.5}",
        "network={width: 32, multipliers: [1, 2], blocks: 1, attention: [], dropout: 0.0, condition: none}",
        f"train.steps={steps}",
        "store={kind: zarr, dtype: fp32}",
        "sample={every_steps: 0, final: 0}",
    ]
    with tempfile.TemporaryDirectory() as directory:
        udddm.train(udddm.load_config("digits", overrides), run_dir=directory, device="cpu")
        stored = find(directory).generations
        assert stored is not None
        newest = max(g for g in stored.existing() if stored.is_complete(g))
        chunks = [
            stored.read(newest, lane, chunk, stored.record(newest, lane)[chunk])
            for lane in range(stored.order.num_lanes)
            for chunk in range(stored.order.num_chunks(lane))
        ]
        samples = np.arange(stored.order.samples)
        zero = generation_zero(stored.order.seed, samples, stored.shape, Encoding("fp32"))
        return torch.from_numpy(np.concatenate(chunks)), zero


def measure(rows: Rows) -> dict[str, dict[str, float]]:
    codecs: tuple[Compression, ...] = get_args(Compression)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in codecs}
    sizes = {}
    for _ in range(ROUNDS):
        for name in codecs:
            began = time.perf_counter()
            data = compress(rows, name)
            between = time.perf_counter()
            back = decompress(memoryview(data), name)
            ended = time.perf_counter()
            assert bytes(back) == rows.tobytes()
            taken[name].append((between - began, ended - between))
            sizes[name] = len(data)
    return {
        name: {
            "of_size": round(sizes[name] / rows.nbytes, 3),
            "compress_mb_per_second": round(rows.nbytes / 1e6 / statistics.median(t for t, _ in taken[name])),
            "decompress_mb_per_second": round(rows.nbytes / 1e6 / statistics.median(t for _, t in taken[name])),
        }
        for name in codecs
        if name != "none"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = about("numcodecs", "zarr")
    print(heading(head))
    trained, noise = states(arguments.steps)
    dtypes: tuple[StateDtype, ...] = get_args(StateDtype)
    result: dict[str, Any] = {}
    print(f"{'state':8}{'dtype':7}{'codec':7}{'of the size':>12}{'compress MB/s':>15}{'decompress MB/s':>17}")
    for title, state in (("digits", trained), ("noise", noise)):
        for dtype in dtypes:
            encoding = Encoding(dtype)
            found = result[f"{title} {dtype}"] = measure(encoding.to_array(encoding.encode(state)))
            for codec, row in found.items():
                rates = f"{row['compress_mb_per_second']:15.0f}{row['decompress_mb_per_second']:17.0f}"
                print(f"{title:8}{dtype:7}{codec:7}{row['of_size']:12.3f}{rates}")
    if arguments.json is not None:
        write_json(arguments.json, head, result)


if __name__ == "__main__":
    main()
