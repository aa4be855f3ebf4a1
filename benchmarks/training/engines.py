"""Differences of engines, ZeRO stages and numbers of processes from the torch engine on two, after 20 steps.

    python benchmarks/training/engines.py --json benchmarks/results/engines.json

Each row is a separate run of `udddm.train` with the same configuration and samples. It shows the maximum difference
over all elements of the weights, of the EMA and of the optimizer's moments in the last checkpoint. Then, one checkpoint
is loaded and saved by each engine in turn, without a step, and compared byte by byte. The exit code is 1 if the
difference of an fp32 row is at least 1e-5, if a batch has different samples, or if a byte differs.

On a machine with GPUs, `--device cuda --processes N` runs one process per GPU, and adds fp16 rows.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import udddm
from udddm import networks
from udddm.config import RunConfig, resolve
from udddm.order import Order
from udddm.runs.weights import Saved
from udddm.testing.ranks import Copy, on_ranks

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

SHAPE, SAMPLES, LIMIT = (1, 8, 8), 1797, 1e-5
EMA = 0.9
KINDS = ("model", f"ema-{EMA:g}", "optimizer")
ZERO: dict[str, dict[str, Any]] = {
    **{f"deepspeed-zero{stage}": {"name": "deepspeed", "zero": stage} for stage in range(4)},
    "deepspeed-zero2-offload": {"name": "deepspeed", "zero": 2, "offload": True},
}
CHAIN = [("deepspeed-zero3", 2), ("torch", 1), ("deepspeed-zero1", 4), ("deepspeed-zero3", 2)]


def config(engine: str, precision: str, steps: int) -> RunConfig:
    return resolve(
        {
            "network": {
                "base_channels": 32,
                "channel_mult": [1, 2],
                "blocks_per_level": 1,
                "attention_resolutions": [4],
                "dropout": 0.0,
            },
            "engine": ZERO.get(engine, {}),
            "train": {
                "steps": steps,
                "batch_size": 64,
                "learning_rate": 7e-4,
                "ema": [EMA],
                "grad_clip": 1.0,
                "precision": precision,
                "tf32": False,  # and one memory format: float32 rows are compared to rounding
                "channels_last": False,
                "cuda_graphs": False,
            },
            "checkpoint": {"every_steps": steps},
            "sample": {"every_steps": 0, "final": 0},
            "log_every_steps": steps,
        }
    )


def same_batches(steps: int, worlds: list[int]) -> bool:
    """Whether each step has the same set of samples for every number of ranks."""
    order = Order.build(config("torch", "fp32", steps).order, 0, SAMPLES, 64, SHAPE)

    def samples(world: int, step: int) -> list[int]:
        batches = [
            order.batch_of(order.lanes_of(rank, world), *divmod(step, order.steps_per_epoch)) for rank in range(world)
        ]
        return sorted(int(i) for batch in batches for i in batch.ids[batch.weights > 0])

    return all(samples(w, step) == samples(worlds[0], step) for w in worlds for step in range(steps))


def differences(run: Path, other: Path, steps: int) -> dict[str, float]:
    found = {}
    for kind, name in zip(KINDS, ("weight", "ema", "moment"), strict=True):
        a, b = (Saved(place / "checkpoints" / f"step-{steps:08d}", kind) for place in (run, other))
        if set(a) != set(b):
            raise SystemExit(f"{run} and {other} have different tensors: {set(a) ^ set(b)}")
        tensors = [key for key in a if name != "moment" or "/" in key]  # not the scalars
        found[f"max_{name}_difference_vs_torch"] = max(float((a[k] - b[k]).abs().max()) for k in tensors)
    return found


def moved(run: Path, steps: int) -> float:
    """The maximum change of a weight during training, as the scale for the differences."""
    saved = Saved(run / "checkpoints" / f"step-{steps:08d}", "model")
    initial = dict(networks.for_run(config("torch", "fp32", steps), SHAPE).named_parameters())
    return max(float((saved[name] - p.detach()).abs().max()) for name, p in initial.items())


def sha256(directory: Path) -> str:
    """SHA-256 of all weights, averages and moments of a checkpoint, independent of the number of files."""
    found = hashlib.sha256()
    for kind in KINDS:
        saved = Saved(directory, kind)
        for name in sorted(saved):
            found.update(f"{kind}/{name}".encode() + saved[name].numpy().tobytes())
    return found.hexdigest()


def portability(place: Path, steps: int) -> list[dict[str, Any]]:
    """Load and save one checkpoint with each engine in turn."""
    first = place / "first"
    udddm.train(config("deepspeed-zero3", "fp32", steps), run_dir=first, device="cpu", workers=2)
    here = first / "checkpoints" / f"step-{steps:08d}"
    rows = [{"engine": "deepspeed-zero3", "processes": 2, "sha256": sha256(here)}]
    for number, (engine, processes) in enumerate(CHAIN[1:]):
        there = place / f"copy-{number}"
        meeting = place / f"meeting-{number}"
        meeting.mkdir()
        on_ranks(processes, meeting, Copy(config(engine, "fp32", steps), SHAPE, here, there))
        here = there
        rows.append({"engine": engine, "processes": processes, "sha256": sha256(here)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    many, on_gpu = arguments.processes, arguments.device == "cuda"
    plans = [(engine, many, "fp32") for engine in ZERO]
    if not on_gpu:
        plans += [("torch", 1, "fp32"), ("torch", 4, "fp32"), ("deepspeed-zero3", 4, "fp32")]
    for precision in ("bf16", *(["fp16"] if on_gpu else [])):
        plans += [(engine, many, precision) for engine in ("torch", *ZERO)]
    head = about("deepspeed", device=torch.cuda.get_device_name() if on_gpu else None)
    lines = [
        heading(head),
        f"largest difference from torch, fp32, {many} processes, after {arguments.steps} steps",
        f"{'engine':24}{'processes':>10}  precision{'weights':>10}{'EMA':>10}{'moments':>10}",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        reference = Path(name) / "reference"
        udddm.train(config("torch", "fp32", arguments.steps), run_dir=reference, device=arguments.device, workers=many)
        for number, (engine, processes, precision) in enumerate(plans):
            run = Path(name) / str(number)
            chosen = config(engine, precision, arguments.steps)
            udddm.train(chosen, run_dir=run, device=arguments.device, workers=processes, max_failures=0)
            row = {"engine": engine, "processes": processes, "precision": precision}
            row |= differences(run, reference, arguments.steps)
            rows.append(row)
            figures = "".join(f"{value:10.1e}" for key, value in row.items() if key.startswith("max_"))
            lines.append(f"{engine:24}{processes:10}  {precision:9}{figures}")
            print(lines[-1], flush=True)
        travelled = moved(reference, arguments.steps)
        chain = [] if on_gpu else portability(Path(name), arguments.steps)
    batches = same_batches(arguments.steps, [1, 2, 4])
    exact = len({row["sha256"] for row in chain}) <= 1
    close = all(
        row[f"max_{kind}_difference_vs_torch"] < LIMIT
        for row in rows
        if row["precision"] == "fp32"
        for kind in ("weight", "ema")
    )
    tail = [
        "",
        f"training has moved the weights by up to {travelled:.1e}",
        f"samples of every step with 1, 2 and 4 processes: {'the same' if batches else 'DIFFERENT'}",
    ]
    if chain:
        way = ", ".join(f"{row['engine']} on {row['processes']}" for row in chain)
        tail.append(f"saved and loaded by {way}: {'every byte the same' if exact else 'DIFFERENT'}")
    print("\n".join(tail))
    if arguments.json is not None:
        found = {
            "weights_moved": travelled,
            "same_batches": batches,
            "portable": exact,
            "rows": rows,
            "chain": chain,
        }
        write_json(arguments.json, head, found)
        arguments.json.with_suffix(".txt").write_text("\n".join([*lines, *tail]) + "\n")
    return 0 if close and batches and exact else 1


if __name__ == "__main__":
    sys.exit(main())
