"""Images/s at which a folder of JPEG files is read with several `data.workers`.

    python benchmarks/training/decoding.py --json benchmarks/results/decoding.json

The files are 500 x 375 pixels, the usual size in ImageNet, cropped and resized to 64 x 64. Batches are requested as in
training, four ahead. Rounds of all settings alternate in one process; ratios are medians over rounds, with the range of
the middle half. With 0 workers a thread of the training process reads the images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from udddm.data import ImageDataset
from udddm.data.folder import FolderImages
from udddm.data.reading import ProcessReader

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

AHEAD = 4


def write_files(folder: Path, count: int) -> None:
    """JPEG files with detail at several scales."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 255, (side * 3, side * 4, 3), np.uint8)).resize((500, 375)), "f4"
            )
            for side in (2, 10, 50)
        ]
        pixels = sum(weight * layer for weight, layer in zip((0.5, 0.3, 0.2), layers, strict=True))
        Image.fromarray(np.asarray(pixels, np.uint8)).save(folder / f"{number:05d}.jpg", quality=90)


def rate(request: Callable[[np.ndarray[Any, Any]], Any], batches: list[np.ndarray[Any, Any]]) -> float:
    """Images/s over the batches, of which `AHEAD` are requested in advance."""
    began = time.perf_counter()
    pending: deque[Any] = deque()
    for ids in batches:
        pending.append((request(ids), ids))
        if len(pending) > AHEAD:
            read, first = pending.popleft()
            read(first)
    for read, first in pending:
        read(first)
    return sum(map(len, batches)) / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--files", type=int, default=256)
    parser.add_argument("--passes", type=int, default=4, help="how often a round reads every file")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    head = about("pillow")
    lines = [heading(head), f"{'workers':>7}{'images/s':>10}{'over the one before':>21}   middle half"]
    print("\n".join(lines), flush=True)
    rows: list[dict[str, Any]] = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        write_files(Path(name), arguments.files)
        dataset = ImageDataset(FolderImages(Path(name), size=64))
        ids = np.random.default_rng(1).permutation(arguments.files)
        batches = [ids[first : first + arguments.batch] for first in range(0, len(ids), arguments.batch)]
        batches *= arguments.passes
        readers = {count: ProcessReader(dataset, count) for count in arguments.workers if count}
        requests: dict[int, Callable[[np.ndarray[Any, Any]], Any]] = {
            count: readers[count].request if count else lambda ids: dataset.batch for count in arguments.workers
        }
        for request in requests.values():
            rate(request, batches)  # the processes start
        rates: dict[int, list[float]] = {count: [] for count in arguments.workers}
        for _ in range(arguments.rounds):
            for count, request in requests.items():
                rates[count].append(rate(request, batches))
        for reader in readers.values():
            reader.close()
    before: list[float] | None = None
    for count, found in rates.items():
        line, row = f"{count:7}{statistics.median(found):10.0f}", {"workers": count, "images_per_second": found}
        if before is not None:
            low, middle, high = statistics.quantiles([b / a for a, b in zip(before, found, strict=True)], n=4)
            line += f"{middle:21.2f}   {low:.2f} to {high:.2f}"
            row |= {"ratio": middle, "half": [low, high]}
        before = found
        rows.append(row)
        lines.append(line)
        print(line, flush=True)
    write_report(arguments.json, head, {"rows": rows}, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
