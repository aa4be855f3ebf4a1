"""P12: the commands, as a user types them: train, stop, resume, sample, evaluate, and what cannot work."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpu_steps.harness import Bench, Check

SMALL = (
    "train.steps=40",
    "sample.every_steps=0",
    "sample.final=16",
    "checkpoint.every_steps=10",
    "train.batch_size=16",
)
IMAGE_LIMIT = 0.05
"""Of images in [-1, 1], from the same weights and seeds on the device and on a CPU."""


def command(bench: Bench, *arguments: str, device: str = "") -> tuple[int, str, float]:
    """Run `udddm ...` in the check's directory. (exit code, output, seconds)."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "udddm", *arguments, "--device", device or bench.device],
        cwd=bench.scratch,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, round(time.perf_counter() - began, 1)


def succeed(bench: Bench, *arguments: str, device: str = "") -> float:
    """Seconds that the command took. Raises AssertionError when it fails."""
    code, output, seconds = command(bench, *arguments, device=device)
    if code:
        print(output[-6000:])
    assert code == 0, f"udddm {' '.join(arguments)} ended with exit code {code}"
    return seconds


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def demo(bench: Bench) -> None:
    """The preset digits from start to end; its images from the device and from a CPU; its scores."""
    settings = SMALL if bench.small else ()
    run = bench.scratch / "digits"
    seconds = succeed(bench, "train", "--config", "digits", "--run-dir", str(run), *settings)
    found = result(run)
    kept = {key: found[key] for key in ("steps", "images_per_second", "loss") if key in found}
    bench.report(train_s=seconds, **kept)
    images = {}
    for device in dict.fromkeys((bench.device, "cpu")):
        out = bench.scratch / f"samples-{device}"
        seconds = succeed(bench, "sample", str(run), "--count", "64", "--out", str(out), device=device)
        images[device] = np.load(out / "samples.npy")
        bench.report(**{f"sample_{device}_s": seconds})
    largest = float(np.abs(images[bench.device] - images["cpu"]).max())
    bench.report(images_differ_from_cpu=largest)
    assert largest < IMAGE_LIMIT, f"images differ from a CPU's by up to {largest:.2g}"
    scores = bench.scratch / "scores.json"
    count = str(bench.pick(1797, 64))
    for evaluations in ("1", "2"):
        arguments = ("--count", count, "--steps", evaluations, "--features", "gpu_steps.commands:pixels")
        seconds = succeed(bench, "evaluate", str(run), *arguments, "--metrics", "frechet", "--json", str(scores))
        bench.report(**{f"evaluate_{evaluations}": {**json.loads(scores.read_text()), "seconds": seconds}})


def pixels(images: Any) -> Any:
    """For `--features`: the pixels themselves."""
    return images.flatten(1).float()


def stopped(bench: Bench) -> None:
    """SIGTERM in the middle, and the same command again; SIGKILL, and again."""
    run = bench.scratch / "stopped"
    steps = bench.pick(400, 60)
    settings = (
        "store.kind=pinned",
        "objective={name: ict, pretrain: 0, refined: {share: 0.5}}",
        f"train.steps={steps}",
        f"checkpoint.every_steps={bench.pick(50, 10)}",
        "sample.every_steps=0",
        "sample.final=0",
    )
    arguments = ("train", "--config", "digits", "--run-dir", str(run), *settings)
    figures: dict[str, Any] = {}
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-m", "udddm", *arguments, "--device", bench.device],
            cwd=bench.scratch,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        before = checkpoint_count(run)
        deadline = time.monotonic() + bench.pick(25, 60)
        while checkpoint_count(run) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        began = time.perf_counter()
        errors = process.communicate()[1]
        figures[number.name] = {"exit_code": process.returncode, "seconds": round(time.perf_counter() - began, 2)}
        bench.report(**figures)
        expected = {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        assert process.returncode == expected, f"{number.name}: exit code {process.returncode}\n{errors[-3000:]}"
    figures["resumed_s"] = succeed(bench, *arguments)
    bench.report(**figures, steps=result(run).get("steps"))


def checkpoint_count(run: Path) -> int:
    """The number of the newest checkpoint, or 0."""
    names = [path.name for path in (run / "checkpoints").glob("*")] if run.is_dir() else []
    return max((int("".join(c for c in name if c.isdigit()) or 0) for name in names), default=0)


def refused(bench: Bench) -> None:
    """More workers than GPUs, and a batch that does not fit: exit code 2 or 1, one message, no traceback."""
    found: dict[str, Any] = {}
    cases: dict[str, tuple[str, ...]] = {"workers": ("--config", "digits", "--workers", "2")}
    if bench.device == "cuda":
        cases["memory"] = (
            "--config", "digits", "network={base_channels: 1024, patch: 1, channel_mult: [1], blocks_per_level: 4}",
            "train.batch_size=16384", "data={name: digits}", "order.window=1", "train.precision=fp32",
        )  # fmt: skip
    for name, arguments in cases.items():
        run = ("--run-dir", str(bench.scratch / name), "train.steps=2", "sample.final=0")
        code, output, seconds = command(bench, "train", *arguments, *run)
        found[name] = {"exit_code": code, "seconds": seconds, "last": output.strip().splitlines()[-3:]}
        bench.report(**found)
        if bench.device == "cuda":
            assert code not in (0, 124), f"{name}: exit code {code}"
            assert "Traceback" not in output, f"{name}: a traceback\n{output[-2000:]}"


CHECKS = (
    Check("P12", "demo", 115, demo),
    Check("P12", "stopped", 75, stopped),
    Check("P12", "refused", 60, refused),
)
