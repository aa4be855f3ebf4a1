"""The layout of the x0-state on disk: one Zarr v3 array per generation, written one complete chunk at a time.

    zarr.json                         group; its attributes identify the run and its kind of state
    gen-000012/zarr.json              array [lanes, slots per lane, C, H, W], chunks [1, C, ...], bytes + crc32c
    gen-000012/c/<lane>/<chunk>/0/0/0 a chunk: its rows, little endian, then the CRC32C of these bytes
    gen-000012/complete/lane-0003.json the lane's completion record: the CRC32C of each of its chunks

A chunk is encoded here, not by zarr-python. It is a single write of the rows and four bytes, which is as fast as plain
files, where zarr-python's codec pipeline reaches a third of that, and errors can name the chunk. The result is plain
Zarr that `zarr.open(...)` reads. (Zarr itself would read a missing chunk as zeros.)

A lane's completion record is written after its last chunk is durable. A generation is complete, and immutable from
then on, once every lane has its record, so ranks finish their own lanes and need no barrier. The records also bind
each chunk to its position, so that a chunk swapped with another, or left over from an older generation, is detected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np

from udddm.errors import CorruptChunkError, StoreError
from udddm.order import Order
from udddm.storage.base import ObjectStore
from udddm.storage.lease import KEY as LEASE
from udddm.store.compression import Compression, codec, compress, decompress, of_array
from udddm.store.encoding import Encoding, Rows, StateDtype, generation_zero

FORMAT = 1
Checksums = dict[int, int]
"""The CRC32C of each chunk of a lane."""

_RESIDUE = 0x48674BC7
"""The CRC32C of any bytes followed by their CRC32C."""

_ZARR_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "uint16", "uint8": "uint8", "bytes": "uint8"}


def generation_name(generation: int) -> str:
    return f"gen-{generation:06d}"


class Generations:
    """Reads and writes the generations under one URL. Keeps no state except the completion records it has read.

    `repair(error, samples)` is called for a corrupt chunk before `state` returns generation 0 instead.
    """

    def __init__(
        self,
        objects: ObjectStore,
        order: Order,
        shape: tuple[int, ...],
        encoding: Encoding,
        repair: Callable[[CorruptChunkError, int], None] | None = None,
        compression: Compression = "none",
    ):
        self.objects, self.order, self.shape, self.encoding, self.repair = objects, order, shape, encoding, repair
        self.compression: Compression = compression
        """Compression of new generations; existing ones keep theirs."""
        self._compressions: dict[int, Compression] = {}
        self._records: dict[tuple[int, int], Checksums] = {}

    @property
    def chunk_bytes(self) -> int:
        return int(self.order.chunk_size * np.prod(self.shape)) * self.encoding.array.itemsize

    def identity(self) -> dict[str, Any]:
        return {
            "udddm": FORMAT,
            "order": self.order.fingerprint(),
            "shape": list(self.shape),
            "dtype": self.encoding.name,
        }

    def create(self, run_id: str = "", *, own: bool = False) -> None:
        """Create the group unless it exists; arguments and errors are those of `check_owner`."""
        owner = self.check_owner(run_id, own=own)
        if owner is None or (run_id and not owner):
            self._write_group(run_id)

    def check_owner(self, run_id: str = "", *, own: bool = False) -> str | None:
        """The id of the run that writes here, "" if it is not recorded, None if there is no group yet.

        `run_id`: id of the run that is about to write here; empty for a store inside a run directory, whose location
        identifies it. `own`: a checkpoint of this run refers to this location. Raises StoreError if the group holds
        another kind of state, belongs to another run, or belongs to no run but is not empty, and if a separate
        location holds other files instead of a group.
        """
        try:
            found = dict(json.loads(self.objects.get("zarr.json"))["attributes"])
        except FileNotFoundError:
            if run_id:  # inside a run directory, another store may have been used before
                self.check_free()
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.objects.uri('zarr.json')} is not an x0-state store: {error}") from error
        owner = str(found.pop("run", ""))
        if found != self.identity():
            differing = [k for k in self.identity() if found.get(k) != self.identity()[k]]
            raise StoreError(
                f"{self.objects.uri('')} holds the x0-state of another run "
                f"(it differs in {', '.join(differing)}); choose another store.url or run directory"
            )

        another = bool(owner) and owner != run_id and bool(run_id or not own)
        if another or (owner != run_id and not own and self.existing()):
            raise StoreError(
                f"{self.objects.uri('')} holds the x0-state of another run ({owner or 'id not recorded'}) of the same "
                "kind; give every run a separate store.url, or delete the existing state"
            )
        return owner

    def check_free(self) -> None:
        """Raise StoreError if there is no store here, but files that are not a store's."""
        names = set(self.objects.list(""))
        others = sorted(
            n for n in names if not n.startswith((".", "gen-")) and not n.endswith(".partial") and n != LEASE
        )
        if others and "zarr.json" not in names:
            raise StoreError(
                f"{self.objects.uri('')} is not an x0-state store, and it is not empty "
                f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); choose another place"
            )

    def owner(self) -> str:
        """The id of the run that writes here; empty for a store inside a run directory or one without an owner."""
        return str(json.loads(self.objects.get("zarr.json"))["attributes"].get("run", ""))

    def _write_group(self, run_id: str) -> None:
        attributes = {**self.identity(), "run": run_id} if run_id else self.identity()
        self._put_json("zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})

    def begin(self, generation: int) -> None:
        """Write the array's metadata; all ranks write the same. An existing array keeps its compression."""
        order = self.order
        axes = ("byte",) if self.encoding.name == "bytes" else ("channel", "row", "column")
        try:
            compression = self._compression_of(generation)
        except FileNotFoundError:
            compression = self._compressions[generation] = self.compression
        dims = [order.num_lanes, order.longest_lane, *self.shape]
        item_bytes = self.encoding.array.itemsize
        endian = {"name": "bytes", "configuration": {"endian": "little"}}
        self._put_json(
            f"{generation_name(generation)}/zarr.json",
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": dims,
                "data_type": _ZARR_TYPES[self.encoding.name],
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, order.chunk_size, *self.shape]}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": 0,
                "codecs": [
                    {"name": "bytes"} if item_bytes == 1 else endian,
                    *codec(compression, item_bytes),
                    {"name": "crc32c"},
                ],
                "dimension_names": ["lane", "slot", *axes[: len(self.shape)]],
                "attributes": {"generation": generation, "state_dtype": self.encoding.name},
            },
        )

    def _compression_of(self, generation: int) -> Compression:
        """Raises FileNotFoundError if there is no such generation, StoreError if its metadata is damaged."""
        if generation not in self._compressions:
            key = f"{generation_name(generation)}/zarr.json"
            try:
                self._compressions[generation] = of_array(json.loads(self.objects.get(key)))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{self.objects.uri(key)} is damaged: {error!r}") from error
        return self._compressions[generation]

    def present(self, generation: int, lane: int) -> set[int]:
        """The chunks of a lane that exist and are not empty. Raises StoreError."""
        sizes = self.objects.sizes(f"{generation_name(generation)}/c/{lane}")
        return {int(key.partition("/")[0]) for key, size in sizes.items() if size and key[:1].isdigit()}

    def chunk_key(self, generation: int, lane: int, chunk: int) -> str:
        return f"{generation_name(generation)}/c/{lane}/{chunk}" + "/0" * len(self.shape)

    def write(self, generation: int, lane: int, chunk: int, rows: Rows) -> int:
        """Write a chunk's rows durably and return their checksum. A short last chunk is padded with zeros."""
        missing = self.order.chunk_size - len(rows)
        if missing:
            rows = np.concatenate([rows, np.zeros((missing, *self.shape), rows.dtype)])
        data = compress(rows, self._compressions.get(generation, self.compression))
        checksum = int(google_crc32c.value(np.frombuffer(data, np.uint8)))
        self.objects.put(self.chunk_key(generation, lane, chunk), data, checksum.to_bytes(4, "little"))
        return checksum

    def read(self, generation: int, lane: int, chunk: int, expected: int) -> Rows:
        """A chunk's rows, verified against the recorded checksum `expected`. Raises CorruptChunkError."""
        key = self.chunk_key(generation, lane, chunk)

        def damaged(why: str) -> CorruptChunkError:
            return CorruptChunkError(generation, lane, chunk, self.objects.uri(key), why)

        try:
            data = self.objects.get(key)
        except FileNotFoundError:
            raise damaged("it is missing") from None
        try:
            compression = self._compression_of(generation)
        except FileNotFoundError:
            raise damaged("its generation's zarr.json is missing") from None
        if compression == "none" and len(data) != self.chunk_bytes + 4:
            raise damaged(f"it has {len(data)} bytes instead of {self.chunk_bytes + 4}")
        if len(data) < 4 or google_crc32c.value(data) != _RESIDUE:
            raise damaged("its bytes do not match their checksum")
        if (stored := int.from_bytes(data[-4:], "little")) != expected:
            raise damaged(f"it is intact but not the chunk that was written here ({stored:08x}, not {expected:08x})")
        try:
            content = decompress(memoryview(data)[:-4], compression)
        except (ValueError, RuntimeError) as error:
            raise damaged(f"it cannot be decompressed: {error}") from error
        if len(content) != self.chunk_bytes:
            raise damaged(f"it decompresses to {len(content)} bytes instead of {self.chunk_bytes}")
        count = self.chunk_bytes // self.encoding.array.itemsize
        rows = np.frombuffer(content, self.encoding.array, count).reshape(self.order.chunk_size, *self.shape)
        return rows[: self.order.chunk_slots(lane, chunk)]

    def zero(self, lane: int, chunk: int) -> Rows:
        """A chunk's rows of generation 0, which is never stored."""
        samples = self.order.chunk_samples(lane, chunk)
        return self.encoding.to_array(generation_zero(self.order.seed, samples, self.shape, self.encoding))

    def state(self, generation: int, lane: int, chunk: int, expected: int) -> Rows:
        """Same as `read`, for training: with a `repair`, a corrupt chunk does not end the run."""
        try:
            return self.read(generation, lane, chunk, expected)
        except CorruptChunkError as error:
            self.objects.guard.confirm()  # chunks that a successor replaced are not corrupt and must not be reset
            if self.repair is None:
                raise
            self.repair(error, len(self.order.chunk_samples(lane, chunk)))
            return self.zero(lane, chunk)

    # Completion records.

    def _record_key(self, generation: int, lane: int) -> str:
        return f"{generation_name(generation)}/complete/lane-{lane:04d}.json"

    def complete(self, generation: int, lane: int, checksums: Checksums) -> None:
        """Record a lane as complete, after all its chunks are durable."""
        assert len(checksums) == self.order.num_chunks(lane)
        values = [checksums[c] for c in range(len(checksums))]
        record = {"generation": generation, "lane": lane, "checksums": values}
        self._put_json(self._record_key(generation, lane), record)
        self._records[generation, lane] = dict(checksums)

    def record(self, generation: int, lane: int) -> Checksums:
        """The checksums of a complete lane. Raises StoreError if it is not complete or its record is damaged."""
        if (generation, lane) not in self._records:
            key = self._record_key(generation, lane)
            where = self.objects.uri(key)
            try:
                record = json.loads(self.objects.get(key))
                values = [int(v) for v in record["checksums"]]
                intact = record["generation"] == generation and record["lane"] == lane
                own = record["self"] == self._self_checksum(record)
            except FileNotFoundError:
                raise StoreError(f"x0-state generation {generation}, lane {lane} is not complete: no {where}") from None
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"the completion record {where} is damaged: {error!r}") from error
            if not (intact and own and len(values) == self.order.num_chunks(lane)):
                raise StoreError(f"the completion record {where} is damaged or belongs elsewhere")
            self._records[generation, lane] = dict(enumerate(values))
        return self._records[generation, lane]

    def record_checksum(self, generation: int, lane: int) -> int:
        """A checksum that distinguishes this lane of the generation from any other content at the same location."""
        return _identity(self.record(generation, lane))

    def restore_record(self, generation: int, lane: int, identity: int) -> bool:
        """Rebuild a lost completion record from the checksums stored in the chunks. False unless it has this
        `identity`, the value of `record_checksum`."""
        found = {}
        for chunk in range(self.order.num_chunks(lane)):
            try:
                data = self.objects.get(self.chunk_key(generation, lane, chunk))
            except FileNotFoundError:
                return False
            found[chunk] = int.from_bytes(data[-4:], "little")
        if _identity(found) != identity:
            return False
        self.complete(generation, lane, found)
        return True

    def complete_lanes(self, generation: int) -> list[int]:
        names = self.objects.list(f"{generation_name(generation)}/complete")
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"lane-(\d+)\.json", name)))

    def is_complete(self, generation: int) -> bool:
        return self.complete_lanes(generation) == list(range(self.order.num_lanes))

    def reopen(self, generation: int, lane: int) -> None:
        """Make a lane incomplete again, because a resumed run is about to rewrite it."""
        self._records.pop((generation, lane), None)
        self.objects.delete(self._record_key(generation, lane))

    def existing(self) -> list[int]:
        """The generations that exist at least in part, complete or not."""
        return sorted(int(m[1]) for name in self.objects.list("") if (m := re.fullmatch(r"gen-(\d{6,})", name)))

    def delete(self, generation: int, lanes: range) -> None:
        """Delete a generation's lanes, completion records first, so that a crash leaves it visibly incomplete."""
        self._compressions.pop(generation, None)
        for lane in lanes:
            self.reopen(generation, lane)
        if len(lanes) == self.order.num_lanes:
            self.objects.delete(generation_name(generation))
        for lane in lanes:
            self.objects.delete(f"{generation_name(generation)}/c/{lane}")

    def delete_if_empty(self, generation: int) -> None:
        """Delete the rest of a generation once every rank has deleted its lanes."""
        name = generation_name(generation)
        if not any(self.objects.list(f"{name}/c")) and not any(self.objects.list(f"{name}/complete")):
            self.objects.delete(name)

    def _self_checksum(self, value: dict[str, Any]) -> int:
        body = {k: v for k, v in value.items() if k != "self"}
        return int(google_crc32c.value(json.dumps(body, sort_keys=True).encode()))

    def _put_json(self, key: str, value: dict[str, Any]) -> None:
        if "checksums" in value:
            value = {**value, "self": self._self_checksum(value)}
        self.objects.put(key, json.dumps(value, indent=1).encode())


def _identity(record: Checksums) -> int:
    return int(google_crc32c.value(json.dumps([record[c] for c in range(len(record))]).encode()))


def order_of(settings: Any, where: str) -> Order:
    """The order that a store or snapshot describes. Raises StoreError, naming `where`."""
    try:
        for key, value in settings.items():
            if type(value) is not int or (value < 1 and key != "seed"):
                raise ValueError(f"{key} is {value!r}")
        return Order.from_fingerprint(settings)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise StoreError(f"{where} does not describe the order of a run: {error!r}") from error


def open_existing(objects: ObjectStore) -> Generations:
    """Open an existing store as its group metadata describes it, for inspection. Raises StoreError."""
    where = objects.uri("zarr.json")
    try:
        found = json.loads(objects.get("zarr.json"))["attributes"]
        settings = found["order"]
        dtype: StateDtype = found["dtype"]
        order = order_of(settings, where)
        return Generations(objects, order, tuple(int(d) for d in found["shape"]), Encoding(dtype))
    except FileNotFoundError:
        raise StoreError(f"no x0-state store found: {where} does not exist") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{where} does not describe an x0-state store: {error!r}") from error
