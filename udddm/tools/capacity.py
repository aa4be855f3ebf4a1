"""The storage needs of a data set's x0-state, and the speed of this machine or a URL (`udddm-store plan`, `bench`)."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from udddm.config import OrderConfig
from udddm.order import LANES, Order
from udddm.storage.base import ObjectStore
from udddm.store.encoding import Encoding, StateDtype

S3_PUTS_A_SECOND = 3500
S3_GETS_A_SECOND = 5500
"""Requests per second that S3 sustains for one key prefix (Amazon S3 user guide, "Best practices design patterns")."""


@dataclass(frozen=True)
class Needs:
    """The demands of training at a given speed on a store, in bytes and seconds."""

    order: Order
    workers: int
    generation_bytes: int
    chunk_bytes: int
    window_bytes: int
    bytes_per_second: float
    """Bytes read per second, and as many written, over all workers."""
    chunks_per_second: float
    """Gets per second, and as many puts, over all workers."""
    window_seconds: float
    """Seconds that a window is in use: the time available to read the next one and write the previous one."""

    @property
    def rank_bytes_in_memory(self) -> int:
        return self.generation_bytes // self.workers

    @property
    def rank_bytes_in_windows(self) -> int:
        lanes = self.order.num_lanes // self.workers
        return 3 * lanes * self.window_bytes


def needs(
    samples: int, shape: tuple[int, ...], dtype: StateDtype, images_per_second: float, workers: int, batch: int
) -> Needs:
    """Compute the needs. The lanes are those that such a run has by default, or as many as there are workers."""
    order = Order.build(OrderConfig(), 0, samples, math.lcm(batch, LANES), shape)
    if order.num_lanes % workers:
        order = Order.build(OrderConfig(lanes=workers), 0, samples, math.lcm(batch, workers), shape)
    lanes = order.num_lanes
    item = int(np.prod(shape)) * Encoding(dtype).array.itemsize
    window = min(order.chunks_per_window * order.chunk_size, order.longest_lane)
    return Needs(
        order=order,
        workers=workers,
        generation_bytes=samples * item,
        chunk_bytes=order.chunk_size * item,
        window_bytes=window * item,
        bytes_per_second=images_per_second * item,
        chunks_per_second=images_per_second / order.chunk_size,
        window_seconds=window * lanes / images_per_second,
    )


def plan(needed: Needs) -> list[str]:
    """Lines that describe the needs of the state, which store fits and why, and the billable usage on S3."""
    order, gib = needed.order, 2.0**30
    lines = [
        f"x0-state: {needed.generation_bytes / gib:.2f} GiB per generation; two to four generations are kept on disk",
        f"layout: {order.num_lanes} lanes of {order.num_chunks(0)} chunks of {order.chunk_size} samples "
        f"({needed.chunk_bytes / 2**20:.2f} MiB), windows of at most {order.chunks_per_window} chunks",
        f"memory per rank: gpu and pinned {needed.rank_bytes_in_memory / gib:.2f} GiB; "
        f"zarr {needed.rank_bytes_in_windows / gib:.2f} GiB",
        f"bandwidth: {needed.bytes_per_second / 1e6:.1f} MB/s read and as much written, over {needed.workers} workers",
        f"requests: {needed.chunks_per_second:.2f} gets and as many puts per second, over all workers",
        f"patience: a window is in use for {needed.window_seconds:.1f} s; if reading the next or writing the "
        "previous one takes longer, a rank holds more windows, up to store.memory_mb",
    ]
    if needed.rank_bytes_in_memory < 2 * gib:
        lines.append(
            "fits: gpu, because the state is small compared to a network's activations; pinned and zarr also fit"
        )
    elif needed.rank_bytes_in_memory < 64 * gib:
        lines.append("fits: pinned, if the host has the memory; zarr on a local NVMe disk needs less of it")
    else:
        lines.append("fits: zarr, on local disks for one node or object storage for several; too large for memory")
    share = needed.chunks_per_second / S3_PUTS_A_SECOND
    lines.append(
        f"on S3: {needed.chunks_per_second * 3600:.0f} puts and as many gets per hour, "
        f"{needed.bytes_per_second * 3600 / gib:.1f} GiB per hour each way (free within a region, billed across), "
        f"{3 * needed.generation_bytes / gib:.1f} GiB stored; {share:.2%} of one prefix's {S3_PUTS_A_SECOND} puts/s"
    )
    return lines


@dataclass(frozen=True)
class Speed:
    """Measured speed of a store for objects of one size. Latencies in seconds, rates in bytes per second over all
    threads."""

    object_bytes: int
    threads: int
    write_latency: float
    read_latency: float
    write_rate: float
    read_rate: float


def measure(objects: ObjectStore, object_bytes: int, *, threads: int = 8, count: int = 32) -> Speed:
    """Write, read and delete `count` objects under `bench/`. Latencies are the median of single requests. Raises
    StoreError."""
    data = np.random.default_rng(0).bytes(object_bytes)
    keys = [f"bench/{i}" for i in range(count)]
    latencies: dict[str, list[float]] = {"put": [], "get": []}
    try:
        for key in keys[:5]:
            began = time.perf_counter()
            objects.put(key, data)
            latencies["put"].append(time.perf_counter() - began)
            began = time.perf_counter()
            objects.get(key)
            latencies["get"].append(time.perf_counter() - began)
        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            list(pool.map(lambda key: objects.put(key, data), keys))
            writing = time.perf_counter() - began
            began = time.perf_counter()
            list(pool.map(objects.get, keys))
            reading = time.perf_counter() - began
    finally:
        objects.delete("bench")
    return Speed(
        object_bytes,
        threads,
        float(np.median(latencies["put"])),
        float(np.median(latencies["get"])),
        count * object_bytes / writing,
        count * object_bytes / reading,
    )


def verdict(needed: Needs, speed: Speed) -> list[str]:
    """Lines that compare the measured speed with the needs."""
    lines = [
        f"single request of {speed.object_bytes / 2**20:.2f} MiB: write {speed.write_latency * 1e3:.1f} ms, "
        f"read {speed.read_latency * 1e3:.1f} ms",
        f"{speed.threads} threads: write {speed.write_rate / 1e6:.0f} MB/s, read {speed.read_rate / 1e6:.0f} MB/s",
    ]
    for name, rate in (("write", speed.write_rate), ("read", speed.read_rate)):
        ratio = rate / needed.bytes_per_second
        slow = "TOO SLOW: training will wait for the store"
        word = "enough" if ratio >= 1.5 else "just enough" if ratio >= 1 else slow
        lines.append(f"{name}: {ratio:.1f} times the needed {needed.bytes_per_second / 1e6:.1f} MB/s ({word})")
    return lines
