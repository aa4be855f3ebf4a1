"""At how many ranks does a training run wait for its x0-state store on S3? A simulation of 8 to 1,024 ranks.

    python benchmarks/store/scale.py --json results.json --plot results.png

The simulation runs the real `zarr` store, one per rank: order, pipeline, generations, checksums, retries. Two things
are simulated. (1) Time: the store's threads run one at a time, each until it waits, and the clock then jumps to the
next event (`World`). (2) The object store (`Service`): a request takes a token of its prefix or is refused (503
SlowDown, which the store retries), then takes a lognormal time to the first byte, then its bytes pass a connection, the
rank's link and the link shared by all ranks. A row of state is one number in memory and has its full size in the model.
All ranks run their steps together: a step starts when the slowest rank has its state. Every rank is simulated, none is
extrapolated.

A run starts with a complete generation, at the start of an epoch. If epochs are short, it lasts two, including the
transitions between them; else it lasts four windows of a lane, without a transition. Its first step is not measured.
Sample ids, the lease and checkpoints are not simulated.

The validation runs the same code in real time, with real threads and real sleeps, for 1 to 4 ranks in one process.

Weak scaling: images/s and batch grow with the ranks, with one lane per rank. The speeds are those of published runs on
8 GPUs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from object_store_model import (
    LONG_EPOCH,
    Bucket,
    Kind,
    ModelObjects,
    SampleFreeOrder,
    Service,
    SteadyStore,
    SteadyTable,
)
from virtual_time import World

from udddm.config import OrderConfig
from udddm.errors import StoreError
from udddm.order import Order
from udddm.store.autotune import Autotune, Limits
from udddm.store.encoding import Encoding
from udddm.store.generations import Generations
from udddm.store.layout import StateLayout
from udddm.store.pipeline import HostStore
from udddm.store.zarr import REMOTE_THREADS

sys.path.insert(0, str(Path(__file__).parents[1]))
import plots
from report import about, heading, write_json

STALL = 0.01  # fraction of the time
CLEAR = 0.02  # fraction of the time
SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)


# Runs.


@dataclass(frozen=True)
class Workload:
    name: str
    samples: int
    shape: tuple[int, ...]
    images_per_second: float
    """Of one rank."""
    batch: int = 128
    """Of one rank."""
    chunk: int | None = None
    window: int | None = None

    def order(self, ranks: int) -> Order:
        config = OrderConfig(lanes=ranks, chunk=self.chunk, window=self.window)
        whole = Order.build(config, 0, self.samples, self.batch * ranks, self.shape)
        return SampleFreeOrder.from_fingerprint(whole.fingerprint())


WORKLOADS = (
    Workload("CIFAR-10", 50_000, (3, 32, 32), 4900 / 8),
    Workload("ImageNet-64", 1_281_167, (3, 64, 64), 2200 / 8),
    Workload("ImageNet-256 latents", 1_281_167, (4, 32, 32), 5000 / 8),
    Workload("1e9 samples of 64x64", 10**9, (3, 64, 64), 2200 / 8),
)
LEAST_STEPS = 4  # shorter epochs are unrealistic
MOST_WINDOWS = 3000  # per lane: the time of a start is quadratic in them


@dataclass
class Outcome:
    workload: str
    ranks: int
    prefixes: int
    threads: int | None
    """None: chosen by the store."""
    step_seconds: float
    """Seconds of a step without the store."""
    epoch_seconds: float
    window_seconds: float
    """Seconds that a window is in use."""
    seams: int
    """Epochs that end within the measured steps."""
    steps: int = 0
    """Measured."""
    seconds: float = 0.0
    wait: float = 0.0
    """Of the time."""
    gets_per_second: float = 0.0
    puts_per_second: float = 0.0
    peak_gets: int = 0
    """The most requests to one prefix within one second."""
    peak_puts: int = 0
    read_rate: float = 0.0
    write_rate: float = 0.0
    refused: int = 0
    failure: str | None = None
    chunks_read: int = 0
    """From the start until everything is written."""
    chunks_written: int = 0

    @property
    def seam_seconds(self) -> float:
        """Seconds that the run waits per epoch."""
        return self.wait * self.seconds / self.seams if self.seams else math.nan

    def count(self, bucket: Bucket, served: Counter[Kind], moved: Counter[Kind]) -> None:
        """Record the requests since `served` and the bytes since `moved`."""
        if self.steps:
            self.gets_per_second = (bucket.served["get"] - served["get"]) / self.seconds
            self.puts_per_second = (bucket.served["put"] - served["put"]) / self.seconds
            self.read_rate = (bucket.bytes["get"] - moved["get"]) / self.seconds
            self.write_rate = (bucket.bytes["put"] - moved["put"]) / self.seconds
        self.peak_gets, self.peak_puts, self.refused = bucket.peak("get"), bucket.peak("put"), bucket.refused

    @property
    def stalls(self) -> bool:
        return self.failure is not None or self.wait > STALL


def length(order: Order) -> int:
    """Steps of a run: two epochs, to include two transitions between epochs, or four windows if epochs are long."""
    window = -(-order.chunks_per_window * order.chunk_size // order.samples_per_lane_step)
    return max(24, 2 * order.steps_per_epoch + 1) if order.steps_per_epoch <= LONG_EPOCH else 4 * window


def run(
    workload: Workload,
    ranks: int,
    service: Service,
    *,
    threads: int | None = None,
    prefetch: int | None = None,
    steps: int | None = None,
    keep: bool = False,
    seed: int = 0,
    real: bool = False,
) -> Outcome:
    """One run of `steps` steps. `keep`: delete no generation. `real`: in real time, with real rows."""
    order = workload.order(ranks)
    steps = steps or length(order)
    shape = workload.shape if real else (1,)
    encoding = Encoding("fp16")
    chunk_bytes = order.chunk_size * math.prod(workload.shape) * encoding.array.itemsize
    rows = bytes(order.chunk_size * math.prod(shape) * encoding.array.itemsize)
    blank = rows + int(google_crc32c.value(rows)).to_bytes(4, "little")
    result = Outcome(
        workload.name,
        ranks,
        service.prefixes,
        threads,
        step_seconds=workload.batch / workload.images_per_second,
        epoch_seconds=order.steps_per_epoch * workload.batch / workload.images_per_second,
        window_seconds=min(order.chunks_per_window * order.chunk_size, order.longest_lane) / workload.images_per_second,
        seams=(steps - 1) // order.steps_per_epoch,
    )
    world = World()
    clock, sleep = (time.perf_counter, time.sleep) if real else (world.clock, world.sleep)
    with ExitStack() as stack:
        if not real:
            stack.enter_context(world.install(seed))
        bucket = Bucket(service, clock, sleep, seed)
        ways = [ModelObjects(bucket, rank, chunk_bytes, blank) for rank in range(ranks)]
        row_bytes = chunk_bytes // order.chunk_size  # of the modeled rows, which bound windows and threads
        stores: list[HostStore] = []
        for rank, way in enumerate(ways):
            layout = StateLayout(order, order.lanes_of(rank, ranks), shape, encoding, torch.device("cpu"))
            stores.append(_store(layout, way, Limits(threads, prefetch), row_bytes, steps + 2 if keep else 0))
            stack.callback(stores[-1].close)
        values = torch.zeros(order.batch_size // ranks, *shape)
        began = waited = 0.0
        served, moved = Counter[Kind](), Counter[Kind]()
        try:
            for store in stores:
                store.start(1, 0, None)
            for step in range(steps):
                for store in stores:
                    store.read()
                sleep(result.step_seconds)
                for store in stores:
                    store.write(values)
                if step == 0:
                    began, waited = clock(), _waited(stores)
                    served, moved = bucket.served.copy(), bucket.bytes.copy()
                    bucket.asked.clear()
                result.steps = step
        except StoreError as error:
            result.failure = str(error).split(" (tried")[0]
        result.seconds = clock() - began
        if result.steps:
            result.wait = (_waited(stores) - waited) / result.seconds
        result.count(bucket, served, moved)
        try:
            for store in stores:
                store.settle()
        except StoreError as error:
            result.failure = result.failure or str(error).split(" (tried")[0]
        result.chunks_read = sum(way.chunks["get"] for way in ways)
        result.chunks_written = sum(way.chunks["put"] for way in ways)
    return result


def _store(layout: StateLayout, way: ModelObjects, limits: Limits, row_bytes: int, keep: int) -> HostStore:
    """A rank's store, which keeps the first `keep` generations even if they are not needed."""
    table = SteadyTable(Generations(way, layout.order, layout.shape, layout.encoding), layout.lanes)
    table.retained = set(range(keep))
    store = SteadyStore(layout, table, limits)
    store.pace = Autotune(layout.order, layout.lanes, row_bytes, replace(limits, first_threads=REMOTE_THREADS))
    return store


def _waited(stores: list[HostStore]) -> float:
    """Seconds since the start. The stores are read one after the other, so their waits add up."""
    return sum(store.counters.read_wait + store.counters.write_wait for store in stores)


# Validation: the same code in real time.

SMALL = Workload("small", 2048, (1, 16, 16), 400.0, batch=16, chunk=64, window=4)
QUIET = Service(0.005, 0.02, 0.005, 0.02, connection=1e9, link=1e9, total=1e9, gets=math.inf, puts=math.inf)
CASES = (
    ("nothing scarce", QUIET, (4,)),
    ("slow gets", replace(QUIET, get_median=0.35, get_p99=0.7), (1, 2, 4)),
    ("slow puts", replace(QUIET, put_median=0.5, put_p99=1.0), (1, 4)),
    ("narrow link", replace(QUIET, link=170e3), (4,)),
    ("narrow link of all", replace(QUIET, total=600e3), (4,)),
    ("few requests", replace(QUIET, gets=20, puts=20, burst=0.2), (4,)),
)
"""Service and ranks. The small workload needs 205 kB/s each way and 6.25 gets and puts per second and rank."""


@dataclass
class Check:
    case: str
    ranks: int
    measured_wait: float
    simulated_wait: float
    measured_step: float
    """Seconds."""
    simulated_step: float
    """The mean over some seeds; the next two are the range."""
    simulated_least: float
    simulated_most: float

    @property
    def error(self) -> float:
        """Relative error of a step's time."""
        return self.simulated_step / self.measured_step - 1


def validate(seeds: int = 8) -> list[Check]:
    """If requests are refused, runs differ because of the retries' random pauses; then this is the mean of 3 runs."""
    checks = []
    for case, service, scales in CASES:
        for ranks in scales:
            workload = replace(SMALL, samples=SMALL.samples * ranks)
            repeats = 1 if math.isinf(service.gets) else 3
            measured = [run(workload, ranks, service, steps=160, real=True) for _ in range(repeats)]
            simulated = [run(workload, ranks, service, steps=160, seed=seed) for seed in range(1, seeds + 1)]
            assert all(each.failure is None for each in measured), measured
            steps = [each.seconds / each.steps for each in simulated]
            checks.append(
                Check(
                    case,
                    ranks,
                    float(np.mean([each.wait for each in measured])),
                    float(np.mean([each.wait for each in simulated])),
                    float(np.mean([each.seconds / each.steps for each in measured])),
                    float(np.mean(steps)),
                    min(steps),
                    max(steps),
                )
            )
    return checks


# The sweep, and changes that would remove a stall.

INFINITE = math.inf
MOST_PREFIXES = 64
CURES: tuple[tuple[str, dict[str, float], dict[str, Any]], ...] = (
    ("no limit to requests", {"gets": INFINITE, "puts": INFINITE}, {}),
    ("no limit to bandwidth", {"connection": INFINITE, "link": INFINITE, "total": INFINITE}, {}),
    ("gets without latency", {"get_median": 0.0}, {}),
    ("puts without latency", {"put_median": 0.0}, {}),
    ("no generation deleted", {}, {"keep": True}),
    ("store.threads=2", {}, {"threads": 2}),
)


def fits(workload: Workload, ranks: int) -> bool:
    order = workload.order(ranks)
    return order.steps_per_epoch >= LEAST_STEPS and order.num_windows(0) <= MOST_WINDOWS


def remedies(workload: Workload, ranks: int, service: Service, threads: int | None) -> dict[str, Outcome]:
    found = {}
    for name, change, options in CURES:
        found[name] = run(workload, ranks, replace(service, **change), **{"threads": threads, **options})  # type: ignore[arg-type]
    return found


def prefixes_needed(workload: Workload, ranks: int, service: Service, threads: int | None) -> list[Outcome]:
    """Runs with increasing numbers of prefixes, until no request is refused."""
    tried: list[Outcome] = []
    while not tried or (tried[-1].refused and tried[-1].prefixes < MOST_PREFIXES):
        prefixes = 4 * tried[-1].prefixes if tried else 4 * service.prefixes
        tried.append(run(workload, ranks, replace(service, prefixes=prefixes), threads=threads))
    return tried


def row(each: Outcome) -> str:
    seam = f"{each.seam_seconds:7.2f}" if each.seams else "      -"
    rates = (each.gets_per_second, each.puts_per_second, each.peak_gets, each.peak_puts)
    moved = (each.read_rate / 1e6, each.write_rate / 1e6, each.refused)
    return (
        f"{each.workload:21} {each.ranks:5} {each.epoch_seconds:8.1f} {each.window_seconds:7.2f} "
        f"{each.wait:8.2%} {seam} "
        + " ".join(f"{value:7.0f}" for value in (*rates, *moved))
        + (f"  fails: {each.failure}" if each.failure else "")
    )


HEADING = (
    f"{'':27} {'epoch':>8} {'window':>7} {'':8} {'per':>7} "
    f"{'total per s':>15} {'most per prefix':>15} {'MB/s':>15}\n"
    f"{'':21} {'ranks':>5} {'s':>8} {'s':>7} {'wait':>8} {'epoch s':>7} "
    + " ".join(f"{name:>7}" for name in ("gets", "puts", "gets", "puts", "read", "written", "refused"))
)


def _print_checks(checks: list[Check]) -> None:
    print(f"\n{'validation, real time':24} {'wait':>16} {'ms per step':>31}")
    print(
        f"{'':18} {'ranks':>5} {'measured':>9} {'simulated':>9} "
        f"{'measured':>9} {'simulated':>9} {'of seeds':>11} {'error':>7}"
    )
    for check in checks:
        print(
            f"{check.case:18} {check.ranks:5} {check.measured_wait:9.1%} {check.simulated_wait:9.1%} "
            f"{check.measured_step * 1e3:9.1f} {check.simulated_step * 1e3:9.1f} "
            f"{check.simulated_least * 1e3:5.1f}-{check.simulated_most * 1e3:5.1f} {check.error:+7.1%}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=SCALES)
    parser.add_argument("--workloads", nargs="+", default=[each.name for each in WORKLOADS])
    parser.add_argument("--threads", type=int, help="store.threads; by default the store chooses")
    for name in ("get_median", "get_p99", "put_median", "put_p99", "connection", "link", "total", "gets", "puts"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Service(), name))
    parser.add_argument("--prefixes", type=int, default=1)
    parser.add_argument("--no-validation", action="store_true", help="skip the validation (a minute of real time)")
    parser.add_argument("--no-remedies", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    service = Service(
        **{name: value for name, value in vars(arguments).items() if name in Service.__dataclass_fields__}
    )
    began, head = time.perf_counter(), about()
    print(f"{heading(head)}\n{service}")
    checks: list[Check] = []
    if not arguments.no_validation:
        checks = validate()
        _print_checks(checks)
    outcomes: list[Outcome] = []
    first: dict[str, int | None] = {}
    changes: dict[str, dict[str, Outcome]] = {}
    needed: dict[str, list[Outcome]] = {}
    print(f"\n{HEADING}")
    chosen = [each for each in WORKLOADS if each.name in arguments.workloads]
    for workload in chosen:
        first[workload.name] = None
        for ranks in [each for each in arguments.ranks if fits(workload, each)]:
            outcome = run(workload, ranks, service, threads=arguments.threads)
            outcomes.append(outcome)
            print(row(outcome), flush=True)
            if outcome.stalls and first[workload.name] is None:
                first[workload.name] = ranks
    for workload in chosen if not arguments.no_remedies else ():
        own = [each for each in outcomes if each.workload == workload.name]
        stalled = first[workload.name]
        print(f"\n{workload.name}: " + (f"stalls at {stalled} or more ranks" if stalled else "no stall at any scale"))
        clear = next((each for each in own if each.failure or each.wait > CLEAR), None)
        if clear:
            print(f"    {clear.ranks} ranks {'as they are':24} wait {clear.wait:7.2%}")
            changes[workload.name] = remedies(workload, clear.ranks, service, arguments.threads)
            for name, outcome in changes[workload.name].items():
                print(f"    {clear.ranks} ranks, {name:23} wait {outcome.wait:7.2%}", flush=True)
        if own and own[-1].refused:
            needed[workload.name] = prefixes_needed(workload, own[-1].ranks, service, arguments.threads)
            for outcome in (own[-1], *needed[workload.name]):
                told = f"{outcome.refused:5} requests refused, wait {outcome.wait:.2%}"
                print(f"    {outcome.ranks} ranks, prefixes: {outcome.prefixes:2} {told}", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s, of which {time.process_time():.0f} s of CPU")
    result = {
        "service": asdict(service),
        "validation": [{**asdict(check), "error": check.error} for check in checks],
        "runs": [asdict(outcome) for outcome in outcomes],
        "stalls_from": first,
        "changes": {name: {k: asdict(v) for k, v in each.items()} for name, each in changes.items()},
        "more_prefixes_at_most_ranks": {name: [asdict(v) for v in tried] for name, tried in needed.items()},
    }
    if arguments.json:
        write_json(arguments.json, head, result)
    if arguments.plot:
        plots.store_scale(result, arguments.plot)


if __name__ == "__main__":
    main()
