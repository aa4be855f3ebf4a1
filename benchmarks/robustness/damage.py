"""Corrupt random chunks of a zarr store repeatedly: is every corruption detected, and is its chunk named?

    python benchmarks/robustness/damage.py --count 1000 --json benchmarks/results/damage.json
    python benchmarks/robustness/damage.py --count 200 --s3 --json benchmarks/results/damage-s3.json

The store holds three complete generations, written by the pipeline. A corruption is a bit flip, a truncation, a
deletion, a swap of two chunks, or a replacement by the same chunk of an older generation. Each time:

    training     the generation is reopened and all its chunks are read as in training: exactly the corrupt ones must
                 raise CorruptChunkError with their generation, lane and chunk
    verify       `udddm-store verify` must list exactly these
    resume       a store that is started from a checkpoint that needs the chunk must fail, name the chunk, and leave the
                 checkpoint unchanged; with `on_corruption=reinitialize` it must continue and count the chunk's samples
                 (every 20th time)

Then it is undone. Exits 1 if anything was missed. With `--s3`, the chunks are objects on a SeaweedFS server.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

from udddm import store
from udddm.config import StoreConfig
from udddm.errors import CorruptChunkError, StoreError
from udddm.order import Order
from udddm.runs.run import Run
from udddm.storage import open_object_store
from udddm.storage.base import ObjectStore
from udddm.store import Encoding, Snapshot, X0Store
from udddm.store.generations import Generations, open_existing
from udddm.store.layout import StateLayout
from udddm.store.zarr import GenerationTable
from udddm.testing import s3
from udddm.tools.inspect import Place, verify

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

ORDER = Order(seed=11, samples=4 * 12 * 16 - 5, batch_size=64, num_lanes=4, chunk_size=16, chunks_per_window=4)
SHAPE = (3, 8, 8)
LANES = range(ORDER.num_lanes)
NEWEST = 3
KINDS = ("bit flip", "truncation", "deletion", "swap", "stale chunk")
FOUND = ("found by training", "found by verify", "nothing else named")
Chunk = tuple[int, int]


def opened(url: str, run: Path, on_corruption: str = "stop") -> X0Store:
    config = StoreConfig.model_validate({"kind": "zarr", "url": url, "on_corruption": on_corruption})
    return store.build(
        Run(run).store_context(StateLayout(ORDER, LANES, SHAPE, Encoding(config.dtype), torch.device("cpu")), config)
    )


def make(url: str, run: Path) -> Path:
    """Write three generations, all kept, and a checkpoint in the epoch that reads the third. Returns its location."""
    made = opened(url, run)
    made.retain({1, 2, NEWEST})
    made.start(0, 0, None)
    for _ in range(NEWEST * ORDER.steps_per_epoch):
        made.write(0.9 * made.read() + 0.1)
    made.snapshot(run / "checkpoint")
    made.close()
    return run / "checkpoint"


def inflict(
    kind: str, objects: ObjectStore, stored: Generations, rng: random.Random
) -> tuple[dict[str, bytes], set[Chunk]]:
    """Corrupt a chunk (two for a swap) of the newest generation. Returns the original bytes and the chunks."""

    def pick() -> Chunk:
        lane = rng.choice(LANES)
        return lane, rng.randrange(ORDER.num_chunks(lane))

    chunk = pick()
    key = stored.chunk_key(NEWEST, *chunk)
    data = objects.get(key)
    before, damaged = {key: data}, {chunk}
    if kind == "bit flip":
        changed, bit = bytearray(data), rng.randrange(8 * len(data))
        changed[bit // 8] ^= 1 << bit % 8
        objects.put(key, bytes(changed))
    elif kind == "truncation":
        objects.put(key, data[: rng.randrange(len(data))])
    elif kind == "deletion":
        objects.delete(key)
    elif kind == "swap":
        while (other := pick()) == chunk:
            pass
        other_key = stored.chunk_key(NEWEST, *other)
        before[other_key] = objects.get(other_key)
        damaged.add(other)
        objects.put(key, before[other_key])
        objects.put(other_key, data)
    else:
        objects.put(key, objects.get(stored.chunk_key(rng.randrange(1, NEWEST), *chunk)))
    return before, damaged


def read_all(url: str) -> set[Chunk]:
    """The chunks of the newest generation that training cannot read."""
    table = GenerationTable(Generations(open_object_store(url), ORDER, SHAPE, Encoding("fp16")), LANES)
    found = set()
    for lane in LANES:
        for chunk in range(ORDER.num_chunks(lane)):
            try:
                table.load(NEWEST, lane, chunk)
            except CorruptChunkError as error:
                if error.generation == NEWEST:
                    found.add((error.lane, error.chunk))
    return found


def listed(url: str) -> set[Chunk]:
    """The chunks that `udddm-store verify` lists."""
    _, damaged = verify(Place(url, open_existing(open_object_store(url))))
    return {
        (lane, chunk)
        for lane in LANES
        for chunk in range(ORDER.num_chunks(lane))
        if any(f"generation {NEWEST}, lane {lane}, chunk {chunk} is damaged" in line for line in damaged)
    }


def resume(url: str, run: Path, checkpoint: Path, damaged: set[Chunk]) -> str:
    """What is wrong with a start from the checkpoint; "" if nothing."""
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    for on_corruption in ("stop", "reinitialize"):
        again = opened(url, run, on_corruption)
        again.retain({1, 2, NEWEST})
        try:
            again.start(NEWEST, 0, Snapshot(checkpoint, run / "state", again.repair))
            for lane, chunk in damaged:
                again.rows(lane, chunk)
            ended = "continued"
        except CorruptChunkError as error:
            ended = "named" if (error.lane, error.chunk) in damaged else "named another"
        except StoreError as error:
            ended = f"{error}"
        finally:
            again.close()
        samples = sum(len(ORDER.chunk_samples(*chunk)) for chunk in damaged)
        wanted = ("named", 0) if on_corruption == "stop" else ("continued", samples)
        if (ended, again.counters.reinitialized) != wanted:
            return f"{on_corruption}: {ended}, {again.counters.reinitialized} samples reinitialized"
    if before != {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}:
        return "the checkpoint's files changed"
    return ""


def measure(url: str, run: Path, count: int, seed: int) -> dict[str, Counter[str]]:
    checkpoint = make(url, run)
    objects, rng = open_object_store(url), random.Random(seed)
    stored = open_existing(objects)
    rows: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for number in range(count):
        kind = rng.choice(KINDS)
        before, damaged = inflict(kind, objects, stored, rng)
        row, by_training, by_verify = rows[kind], read_all(url), listed(url)
        row["damages"] += 1
        row["found by training"] += damaged <= by_training
        row["found by verify"] += damaged <= by_verify
        row["nothing else named"] += not (by_training | by_verify) - damaged
        if number % 20 == 0:
            problem = resume(url, run, checkpoint, damaged)
            row["resumes"] += 1
            row["resumes as they should"] += not problem
            if problem:
                print(f"{kind} of {damaged}: {problem}")
        for key, data in before.items():
            objects.put(key, data)
    if read_all(url):
        raise SystemExit("the damages were not undone")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = about()
    print(heading(head), flush=True)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = str(directory / "state")
        if arguments.s3:
            os.environ.update(stack.enter_context(s3.running()).environment())
            url = f"s3://{s3.BUCKET}/damage"
        rows = measure(url, directory / "run", arguments.count, arguments.seed)
    columns = ("damages", *FOUND, "resumes", "resumes as they should")
    print(f"{'':12}" + "".join(f"{name:>{len(name) + 3}}" for name in columns))
    total: Counter[str] = sum(rows.values(), Counter())
    for kind, row in {**rows, "all": total}.items():
        print(f"{kind:12}" + "".join(f"{row[name]:>{len(name) + 3}}" for name in columns))
    complete = all(total[name] == total["damages"] for name in FOUND)
    complete &= total["resumes as they should"] == total["resumes"]
    print(f"\n{'every corruption was detected and its chunk named' if complete else 'SOME WERE MISSED'}")
    if arguments.json is not None:
        write_json(arguments.json, head, {"complete": complete, **rows})
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
