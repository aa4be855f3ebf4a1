"""An epoch of the zarr store with 8 and with 64 lanes: requests, files, bytes and MB/s.

    python benchmarks/store/lanes.py --json benchmarks/results/store-lanes.json

One rank reads a generation and writes the next, as fast as it can, with the order that runs had by default (8 lanes in
chunks of 4 MiB and windows of 8), with the one that a large data set has now (64 lanes in chunks of at most 2 MiB), and
with 64 lanes in chunks of 4 MiB. They take turns, on disk, and on an S3 server of this machine (SeaweedFS, if
installed). Images of 3x32x32 pixels, float16 states.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from udddm.config import OrderConfig
from udddm.order import Order
from udddm.storage import open_object_store
from udddm.store import Encoding, StateLayout
from udddm.store.zarr import ZarrStore
from udddm.testing import s3

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

SHAPE = (3, 32, 32)
ROW = 2 * 3 * 32 * 32
ORDERS = {
    "8 lanes": OrderConfig(lanes=8),
    "64 lanes": OrderConfig(),
    "64 lanes of 4 MiB": OrderConfig(lanes=64, window=1),
}


class Turns:
    """Epochs on one store, of which the first, whose states are computed, is not measured."""

    def __init__(self, order: Order, url: str | Path):
        self.order, self.url, self.rates = order, url, list[float]()
        layout = StateLayout(order, range(order.num_lanes), SHAPE, Encoding("fp16"), torch.device("cpu"))
        self.store = ZarrStore(layout, url, default=True)
        self.store.start(0, 0, None)
        self._epoch()

    def _epoch(self) -> float:
        began = time.perf_counter()
        for _ in range(self.order.steps_per_epoch):
            self.store.write(self.store.read())
        self.store.settle()
        return time.perf_counter() - began

    def turn(self) -> None:
        self.rates.append(2 * self.order.samples * ROW / 1e6 / self._epoch())

    def figures(self) -> dict[str, Any]:
        """Files and bytes of the newest generation, and the requests for chunks of an epoch, each way."""
        order, name = self.order, f"gen-{self.store.epoch:06d}"
        chunks = [order.num_chunks(lane) for lane in range(order.num_lanes)]
        sizes = open_object_store(self.url).sizes(f"{name}/c")
        return {
            "mb_per_second": round(statistics.median(self.rates), 1),
            "requests_each_way": sum(chunks),
            "files": len(sizes),
            "chunk_mb": round(order.chunk_size * ROW / 1e6, 2),
            "mb": round(sum(sizes.values()) / 1e6),
            "padding": round(sum(sizes.values()) / (order.samples * ROW) - 1, 4),
            "samples_shuffled_together": order.num_lanes * order.chunks_per_window * order.chunk_size,
            "windows_mb": round(3 * order.num_lanes * order.chunks_per_window * order.chunk_size * ROW / 1e6),
        }


def measure(urls: dict[str, str | Path], samples: int, batch: int, rounds: int, lines: list[str]) -> dict[str, Any]:
    turns = {name: Turns(Order.build(ORDERS[name], 0, samples, batch, SHAPE), url) for name, url in urls.items()}
    try:
        for _ in range(rounds):
            for each in turns.values():
                each.turn()
        found = {name: each.figures() for name, each in turns.items()}
    finally:
        for each in turns.values():
            each.store.close()
    for name, row in found.items():
        lines.append(
            f"  {name:18} {row['mb_per_second']:7} MB/s, {row['requests_each_way']} gets and puts of "
            f"{row['chunk_mb']} MB, {row['files']} files, {row['mb']} MB ({row['padding']:.1%} padding), "
            f"three windows {row['windows_mb']} MB, {row['samples_shuffled_together']} samples shuffled together"
        )
        print(lines[-1], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, metavar="DIR", help="for the states (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = about("zarr")
    lines, places = [heading(head)], {}
    print(lines[0])
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.directory)))
        kinds: dict[str, dict[str, str | Path]] = {"disk": {name: place / name.replace(" ", "-") for name in ORDERS}}
        if s3.binary() is not None:
            os.environ.update(stack.enter_context(s3.running(directory=place / "s3")).environment())
            kinds["S3"] = {name: f"s3://{s3.BUCKET}/{name.replace(' ', '-')}" for name in ORDERS}
        for kind, urls in kinds.items():
            lines.append(f"{kind}: {arguments.samples:,} states, batches of {arguments.batch}")
            print(lines[-1], flush=True)
            places[kind] = measure(urls, arguments.samples, arguments.batch, arguments.rounds, lines)
    write_report(arguments.json, head, {"samples": arguments.samples, "stores": places}, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
