"""What one GPU can show of the GPU paths: correctness, waits, bits, speed and memory, in about 13 minutes.

    python benchmarks/gpu.py --device cuda --json gpu.json --text gpu.txt
    python benchmarks/gpu.py --device cuda --only P2,P6,P5.compiled --seconds 200
    python benchmarks/gpu.py --device cpu          # what can be exercised without a GPU, at small sizes
    python benchmarks/gpu.py --list

A step P0 to P12 is one or more checks. Each check runs in its own forked process with a wall limit, so a crash, a hang
or a broken CUDA context ends that check alone; this process never uses CUDA. The JSON file is replaced after every
check: what was measured before a machine is taken away is kept. A check is `ok`, `failed`, `timeout` or `skipped`, the
last also where its limit does not fit what is left of `--seconds`.

Exit code 0: no check of P1 to P6 failed. 1: one did. 2: the arguments are wrong, or there is no such device. A check
that was skipped, for lack of time or of a package, does not count; the summary lists it.

On a machine with Python 3.12 and torch 2.11 or later, but no network, first put the wheels it lacks into a folder:

    pip download -d .whl --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --no-deps \\
        pydantic pydantic-core annotated-types typing-inspection typing-extensions zarr donfig numcodecs \\
        google-crc32c einops hjson diffusers
    DS_BUILD_OPS=0 pip wheel -w .whl --no-deps --no-build-isolation deepspeed==0.19.8

(pydantic-core in the version that pydantic names; diffusers 0.42 also imports huggingface_hub 2, which needs httpx2,
httpcore2, truststore and h11) and there:

    pip install --no-index --find-links .whl --no-deps .whl/*.whl
    python benchmarks/gpu.py --device cuda --json gpu.json --text gpu.txt

It needs neither Ray nor an installed udddm: the repository's own package is used. Without deepspeed or
pytest the checks that need them are skipped; without diffusers there is no such peer.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 440.0
PROBE_LIMIT = 60.0
ROOM = 4 << 30
SLOW = 4.0
"""Limits are for a machine with a GPU. On a CPU, which others may use too, they are so many times as long."""


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", metavar="STEPS", help="steps and checks to run, as P2,P5.compiled")
    parser.add_argument("--seconds", type=float, help=f"wall time of all checks; default: {SECONDS:g}, more on a CPU")
    parser.add_argument(
        "--patience", type=float, metavar="FACTOR", help="multiply the limits of checks, on a machine with other work"
    )
    parser.add_argument("--small", action="store_true", help="sizes for a test; always so on a CPU")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a summary to read")
    parser.add_argument("--commit", help="what was measured; unset: what git says")
    parser.add_argument("--list", action="store_true", help="list the checks and their limits, and run none")
    return parser.parse_args(argv)


def commit() -> str:
    """The commit of the repository, with `-dirty` where files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line(given: Sequence[str]) -> str:
    """The command without the places of its results, which tell a reader nothing."""
    places, kept = {"--json", "--text", "--commit"}, ["python benchmarks/gpu.py"]
    words = iter(given)
    for word in words:
        if word in places:
            next(words, None)
        elif word.partition("=")[0] not in places:
            kept.append(word)
    return " ".join(kept)


def selected(only: str | None) -> list[Any]:
    """The checks named by `--only`, in their usual order. Raises ValueError for a name that is not known."""
    from gpu_steps import CHECKS

    if only is None:
        return list(CHECKS)
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {check.step for check in CHECKS} | {check.full_name for check in CHECKS}
    unknown = sorted(set(names) - known)
    if unknown or not names:
        raise ValueError(f"--only {only}: no step or check {', '.join(unknown)}; --list names them")
    return [check for check in CHECKS if check.step in names or check.full_name in names]


def in_memory() -> Path | None:
    """A file system in memory with room for the checks' files: a synced write costs milliseconds on a disk."""
    place = Path("/dev/shm")
    return place if place.is_dir() and shutil.disk_usage(place).free > ROOM else None


def device_name(device: str, results: Any, bench: Any) -> str:
    """The device's name, found in a forked process. "" where there is no such device."""
    from gpu_steps.harness import Check, Results, perform
    from report import cpu_model

    if device == "cpu":
        return cpu_model()

    def probe(own: Any) -> None:
        import torch

        own.report(name=torch.cuda.get_device_name(0))

    found = Results(results.path.with_name(results.path.name + ".probe"), {})
    perform([Check("device", "probe", PROBE_LIMIT, probe)], bench, found, PROBE_LIMIT + 10)
    found.path.unlink(missing_ok=True)
    record = found.checks[0]
    if record["status"] != "ok":
        print("--device cuda: no CUDA device can be used:", *record.get("error", [])[-5:], sep="\n", file=sys.stderr)
        return ""
    return str(record["figures"]["name"])


def flat(value: Any, prefix: str = "") -> list[str]:
    """Figures as `name value`, one a line, nested names joined by a point."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [prefix, *(f"    {'  '.join(str(part) for part in row)}" for row in value)]
    return [f"{prefix:48} {value}"]


def summary(head: dict[str, Any], checks: list[dict[str, Any]]) -> str:
    """The results as text."""
    from gpu_steps import TITLES
    from gpu_steps.harness import BAD

    lines = [f"{head['date']}, {head['device']}, torch {head['torch']}, commit {head['commit']}", head["command"]]
    counts = {status: sum(c["status"] == status for c in checks) for status in ("ok", "failed", "timeout", "skipped")}
    lines += [", ".join(f"{number} {status}" for status, number in counts.items()), ""]
    step = ""
    for record in checks:
        if record["step"] != step:
            step = record["step"]
            lines += ["", TITLES.get(step, step)]
        lines.append(f"  {record['check']}: {record['status']}, {record.get('seconds', 0):.1f} s")
        if "reason" in record:
            lines.append(f"    {record['reason']}")
        lines += [f"    {line}" for line in flat(record.get("figures", {}))]
        if record["status"] in BAD:
            lines += [f"    | {line}" for line in record.get("error", [])]
    return "\n".join(lines) + "\n"


def list_checks(checks: Sequence[Any]) -> None:
    from gpu_steps import TITLES

    step = ""
    for check in checks:
        if check.step != step:
            step = check.step
            print(TITLES[step])
        print(f"    {check.full_name:24} {check.limit:4g} s")
    print(f"limits in all: {sum(check.limit for check in checks):g} s")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests that pick a device themselves
    sys.path.insert(0, str(ROOT))  # before an installed udddm
    inherited = os.environ.get("PYTHONPATH")
    places = [str(ROOT), str(ROOT / "benchmarks"), *([inherited] if inherited else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)  # for processes that checks start
    import torch
    from gpu_steps import DECISIVE
    from gpu_steps.harness import BAD, Bench, Results, perform, terminable

    try:
        checks = selected(arguments.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.list:
        list_checks(checks)
        return 0
    patience = arguments.patience or (SLOW if arguments.device == "cpu" else 1.0)
    checks = [dataclasses.replace(check, limit=check.limit * patience) for check in checks]
    seconds = arguments.seconds or SECONDS * (SLOW if arguments.device == "cpu" else 1)
    began = time.monotonic()
    head: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": arguments.device,
        "torch": torch.__version__,
        "commit": arguments.commit or commit(),
        "command": command_line(sys.argv[1:] if argv is None else argv),
        "small": arguments.small or arguments.device == "cpu",
    }
    results = Results(arguments.json, head)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=in_memory()) as scratch, terminable():
        bench = Bench(arguments.device, head["small"], ROOT, Path(scratch))
        head["device"] = device_name(arguments.device, results, bench)
        if not head["device"]:
            return 2
        perform(checks, bench, results, seconds - (time.monotonic() - began))
    head["seconds"] = round(time.monotonic() - began, 1)
    results.save()
    text = summary(head, results.checks)
    if arguments.text is not None:
        arguments.text.parent.mkdir(parents=True, exist_ok=True)
        arguments.text.write_text(text)
    bad = [f"{c['step']}.{c['check']}" for c in results.checks if c["status"] in BAD]
    for record in results.checks:
        if record["status"] in BAD:
            print(f"\n{record['step']}.{record['check']}: {record['status']}", *record["error"], sep="\n    ")
    print(f"\n{len(results.checks)} checks in {head['seconds']:.0f} s, {len(bad)} failed: {', '.join(bad) or '-'}")
    return 1 if any(name.split(".")[0] in DECISIVE for name in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
