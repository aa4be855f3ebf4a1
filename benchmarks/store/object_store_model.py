"""A model of an object store in virtual or real time, and stores that start on it in the middle of a run."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np

from udddm.order import Batch, LaneStep, Order
from udddm.storage.base import REMOTE_RETRY, ObjectStore
from udddm.store.base import StateSource
from udddm.store.pipeline import HostStore
from udddm.store.zarr import GenerationTable

Kind = Literal["get", "put"]
LONG_EPOCH = 2000  # steps


@dataclass(frozen=True)
class Service:
    """Parameters of an object store, in seconds, bytes per second and requests per second.

    Defaults are S3's published figures: 100-200 ms per request, 85-90 MB/s per connection, 3,500 puts and 5,500 gets
    per second and prefix ("Best practices design patterns: optimizing Amazon S3 performance"). The tails, the links and
    the idle capacity that a prefix saves up (`burst`) are assumptions. Keys are assumed to spread evenly over the
    prefixes by lane, although `gen-000012/c/<lane>/...` does not let S3 keep a split by lane from one generation to the
    next.
    """

    get_median: float = 0.1
    get_p99: float = 0.5
    put_median: float = 0.15
    put_p99: float = 0.8
    connection: float = 85e6
    link: float = 1.5e9
    """Bandwidth of one rank, each way: an eighth of a node's 100 Gbit/s."""
    total: float = 125e9
    """Bandwidth of all ranks together, each way."""
    gets: float = 5500
    puts: float = 3500
    prefixes: int = 1
    burst: float = 1.0
    """Seconds of its request rate that an idle prefix saves up."""
    refusal: float = 0.02
    """Seconds of a refused request."""


class SlowDown(OSError):
    pass


class _Tokens:
    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._most = rate, max(1.0, rate * burst)
        self._level, self._then = self._most, 0.0

    def take(self, now: float, count: int) -> bool:
        if math.isinf(self._rate):
            return True
        self._level = min(self._most, self._level + (now - self._then) * self._rate)
        self._then = now
        if self._level < min(count, self._most):
            return False
        self._level -= count
        return True


class Bucket:
    """The state of a modeled object store that many ranks share: its objects, limits and request counts."""

    def __init__(self, service: Service, clock: Callable[[], float], sleep: Callable[[float], None], seed: int):
        self.service, self.clock, self.sleep = service, clock, sleep
        self.tree: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.asked: Counter[tuple[Kind, int, int]] = Counter()
        """Requests of each kind to each prefix in each second, including refused ones."""
        self.served: Counter[Kind] = Counter()
        self.bytes: Counter[Kind] = Counter()
        self.refused = 0
        self._random = random.Random(seed)
        self._tokens = {
            (kind, prefix): _Tokens(rate, service.burst)
            for kind, rate in (("get", service.gets), ("put", service.puts))
            for prefix in range(service.prefixes)
        }
        self._free: dict[tuple[Kind, int], float] = {}  # when each link will be free; -1 is the shared one

    def request(self, kind: Kind, rank: int, size: int, count: int = 1) -> None:
        """Wait until the request, which S3 counts as `count` requests, is done. Raises SlowDown."""
        prefix = rank % self.service.prefixes
        with self.lock:
            now, service = self.clock(), self.service
            self.asked[kind, prefix, int(now)] += count
            granted = self._tokens[kind, prefix].take(now, count)
            if granted:
                self.served[kind] += count
                self.bytes[kind] += size
                done = self._transferred(kind, rank, size, now + self._latency(kind))
            else:
                self.refused += 1
                done = now + service.refusal
        self.sleep(done - now)
        if not granted:
            raise SlowDown("503 SlowDown")

    def _latency(self, kind: Kind) -> float:
        service = self.service
        median, p99 = (service.get_median, service.get_p99) if kind == "get" else (service.put_median, service.put_p99)
        return self._random.lognormvariate(math.log(median), math.log(p99 / median) / 2.3263) if median else 0.0

    def _transferred(self, kind: Kind, rank: int, size: int, begin: float) -> float:
        """The time at which the last byte has passed the connection, the rank's link and the shared link, in order of
        arrival."""
        done = begin + size / self.service.connection
        for link, speed in ((rank, self.service.link), (-1, self.service.total)):
            self._free[kind, link] = max(self._free.get((kind, link), 0.0), begin) + size / speed
            done = max(done, self._free[kind, link])
        return done

    def peak(self, kind: Kind) -> int:
        """The most requests of a kind to one prefix within a second of the clock."""
        return max((count for (of, *_), count in self.asked.items() if of == kind), default=0)


class ModelObjects(ObjectStore):
    """One rank's access to a bucket. The model counts a chunk as `chunk_bytes`, whatever its real length."""

    retry = REMOTE_RETRY

    def __init__(self, bucket: Bucket, rank: int, chunk_bytes: int, blank: bytes):
        super().__init__()
        self.bucket, self.rank, self.chunk_bytes, self.blank = bucket, rank, chunk_bytes, blank
        self.free = True
        """Requests take no time within this block, for setting up a run."""
        self.chunks: Counter[Kind] = Counter()

    def _request(self, kind: Kind, key: str, length: int) -> None:
        if not self.free:
            is_chunk = "/c/" in key
            self.chunks[kind] += is_chunk
            self.bucket.request(kind, self.rank, self.chunk_bytes + 4 if is_chunk else length)

    def _node(self, prefix: str) -> Any:
        node: Any = self.bucket.tree
        for name in prefix.split("/") if prefix else ():
            node = node.get(name, {})
        return node

    def _get(self, key: str) -> bytes:
        found = self._node(key)
        self._request("get", key, len(found))
        if isinstance(found, bytes):
            return found
        if key.startswith("gen-000001/c/"):
            return self.blank
        raise FileNotFoundError(key)

    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None:
        data = b"".join(parts)
        self._request("put", key, len(data))
        *path, name = key.split("/")
        node = self.bucket.tree
        for folder in path:
            node = node.setdefault(folder, {})
        node[name] = data

    def _list(self, prefix: str) -> Sequence[str]:
        self._request("get", prefix, 0)
        return [*self._node(prefix)]

    def _delete(self, prefix: str) -> None:
        """Like `S3ObjectStore`: list, delete 1,000 keys per request (each counts as a put), list again."""
        parent, _, name = prefix.rpartition("/")
        self._list(prefix)
        count = _leaves(self._node(prefix))
        for first in range(0, 0 if self.free else count, 1000):
            self.bucket.request("put", self.rank, 0, min(1000, count - first))
        self._node(parent).pop(name, None)
        self._list(prefix)

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        raise NotImplementedError  # no step needs it

    def _compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        raise NotImplementedError

    def _sizes(self, prefix: str) -> dict[str, int]:
        raise NotImplementedError

    def uri(self, key: str) -> str:
        return f"model://{key}"


def _leaves(node: Any) -> int:
    return sum(map(_leaves, node.values())) if isinstance(node, dict) else 1


class SteadyTable(GenerationTable):
    """Starts with generation 1 complete, as if the run had written it. Its rows are zeros."""

    def open(self, epoch: int, step: int, source: StateSource | None) -> None:
        stored = self.generations
        model = stored.objects
        assert isinstance(model, ModelObjects)
        stored.create()
        stored.begin(epoch)
        checksum = int(google_crc32c.value(model.blank[:-4]))
        for lane in self.lanes:
            stored.complete(epoch, lane, dict.fromkeys(range(stored.order.num_chunks(lane)), checksum))
            if stored.order.steps_per_epoch <= LONG_EPOCH:  # the generation will be deleted within the run
                for chunk in range(stored.order.num_chunks(lane)):
                    model.put(stored.chunk_key(epoch, lane, chunk), model.blank)
        model.free = False


class SteadyStore(HostStore):
    def snapshot(self, directory: Path) -> None:
        raise NotImplementedError


class SampleFreeOrder(Order):
    """The order without sample ids and batch size, which the store does not use."""

    def __init__(self, *settings: int):
        super().__init__(*settings)
        self._batches = lru_cache(maxsize=16 * self.num_lanes)(self._compute_batch)

    def _compute_batch(self, lanes: range, epoch: int, step: int) -> Batch:
        parts: list[LaneStep] = [part for lane in lanes for part in self.lane_step(lane, epoch, step)]
        none = np.zeros(len(lanes) * self.samples_per_lane_step, np.int64)
        return Batch(none, none, np.zeros(len(none), np.float32), 0, tuple(parts))
