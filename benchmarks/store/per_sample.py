"""Images per second of a training loop with tensors per sample: `PerSampleState`, np.memmap, and a dictionary.

    python benchmarks/store/per_sample.py --json benchmarks/results/per-sample.json

The method is not one of this package: temporal ensembling (Laine & Aila 2017), with the predictions of a sample or an
image of it as its state. `step` is the loop with a small network; `state` is the same loop without the network, which
leaves loading, reading, averaging and writing. All kinds run in turn in every round, and are compared with the memmap
of their own round. The memmap is in the page cache and never synced, the favorable case.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import udddm

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

SHAPES = {"prediction": (10,), "image": (3, 32, 32)}
KINDS = ("memmap", "dictionary", "memory", "pinned", "zarr")
STORES = {"memory": "gpu", "pinned": "pinned", "zarr": "zarr"}  # `gpu` on a CPU device is a tensor in memory
BATCH, MOMENTUM = 100, 0.6


class Kept(ABC):
    """One float32 tensor per sample."""

    sampler: Any
    """A batch sampler."""

    @abstractmethod
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The tensors of the samples `ids`."""

    @abstractmethod
    def write(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        """Replace them."""


class Memmap(Kept):
    """A file of float32 values, addressed by sample number."""

    def __init__(self, samples: int, shape: tuple[int, ...], place: Path):
        self.sampler = BatchSampler(RandomSampler(range(samples)), BATCH, drop_last=False)
        self._rows = np.memmap(place / "rows", np.float32, "w+", shape=(samples, *shape))

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._rows[ids.numpy()])

    def write(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        self._rows[ids.numpy()] = values.numpy()


class Dictionary(Kept):
    """A tensor for each sample number."""

    def __init__(self, samples: int, shape: tuple[int, ...]):
        self.sampler = BatchSampler(RandomSampler(range(samples)), BATCH, drop_last=False)
        self._rows = {i: torch.zeros(shape) for i in range(samples)}

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._rows[i] for i in ids.tolist()])

    def write(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        self._rows.update(zip(ids.tolist(), values.clone(), strict=True))


class Stored(Kept):
    """`PerSampleState`."""

    def __init__(self, state: udddm.PerSampleState):
        self.sampler, self._state = state.batch_sampler, state

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return self._state.read(ids)["mean"]

    def write(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        self._state.write(mean=values)


@contextmanager
def opened(kind: str, samples: int, shape: tuple[int, ...], directory: Path) -> Iterator[Kept]:
    place = Path(tempfile.mkdtemp(dir=directory))
    try:
        if kind == "memmap":
            yield Memmap(samples, shape, place)
        elif kind == "dictionary":
            yield Dictionary(samples, shape)
        else:
            url = place / "state" if kind == "zarr" else None
            tensors = {"mean": (shape, torch.float32)}
            with udddm.PerSampleState(tensors, samples=samples, batch_size=BATCH, store=STORES[kind], url=url) as state:
                yield Stored(state)
    finally:
        shutil.rmtree(place)


class Network(torch.nn.Module):
    """Predicts ten numbers and an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Dropout(0.3))
        self.prediction = torch.nn.Linear(16 * 16 * 16, 10)
        self.image = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(16, 3, 3, 1, 1))

    def forward(self, images: torch.Tensor, output: str) -> torch.Tensor:
        hidden = self.body(images)
        found: torch.Tensor = self.image(hidden) if output == "image" else self.prediction(hidden.flatten(1)).softmax(1)
        return found


def epochs(kept: Kept, data: TensorDataset, output: str, network: Network | None, count: int) -> float:
    """Images per second of `count` epochs, after one that is not counted."""
    loader = DataLoader(data, batch_sampler=kept.sampler)
    optimizer = None if network is None else torch.optim.SGD(network.parameters(), 0.01)
    began = 0.0
    for epoch in range(count + 1):
        if epoch == 1:
            began = time.perf_counter()
        for ids, images in loader:
            mean = kept.read(ids)
            if network is None or optimizer is None:
                new = images if output == "image" else images[:, 0, 0, :10]
            else:
                found = network(images, output)
                loss = (found - mean).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                new = found.detach()
            kept.write(ids, MOMENTUM * mean + (1 - MOMENTUM) * new)
    return count * len(data) / (time.perf_counter() - began)


def measure(output: str, work: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of every kind in every round, and the medians of the ratios to the memmap of the round."""
    torch.manual_seed(0)
    data = TensorDataset(torch.arange(arguments.samples), torch.randn(arguments.samples, 3, 32, 32))
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for each in range(arguments.rounds):
        turn = each % len(KINDS)
        for kind in KINDS[turn:] + KINDS[:turn]:
            network = Network() if work == "step" else None
            with opened(kind, arguments.samples, SHAPES[output], arguments.directory) as kept:
                rates[kind].append(epochs(kept, data, output, network, arguments.epochs))
    ratios = {
        kind: statistics.median(a / b for a, b in zip(rates[kind], rates["memmap"], strict=True)) for kind in KINDS
    }
    return {"output": output, "work": work, "images_per_second": rates, "relative_to_memmap": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare PerSampleState with np.memmap and a dictionary.")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="for the files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = about("numpy", "zarr")
    lines = [
        heading(head),
        "images/s, median over the rounds (relative to the memmap of the same round)",
        f"{'state, loop':24}" + "".join(f"{kind:>18}" for kind in KINDS),
    ]
    found = []
    for output in SHAPES:
        for work in ("step", "state"):
            row = measure(output, work, arguments)
            found.append(row)
            text = f"{output} {list(SHAPES[output])}, {work}".ljust(24)
            for kind in KINDS:
                rate = statistics.median(row["images_per_second"][kind])
                text += f"{rate:11,.0f} ({row['relative_to_memmap'][kind]:.2f})"
            lines.append(text)
    print("\n".join(lines))
    write_report(arguments.json, head, {"cases": found}, lines)


if __name__ == "__main__":
    main()
