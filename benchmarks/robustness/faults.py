"""The behavior of a training run on object storage for each kind of failing request.

    python benchmarks/robustness/faults.py --json benchmarks/results/faults.json

Each row is a run of `udddm-train --store zarr` in a separate process, on a SeaweedFS server behind a proxy that injects
the fault once the run has written its first checkpoint. Transient faults must be survived by retries. Persistent faults
must end the run with exit code 1 and one error that says what to do; once the fault is fixed, the same command must
resume. In both cases the fingerprints of weights, EMA and x0-state must equal those of a run without faults, and
neither the log nor the run directory may contain the credentials. The full disk is a separate tmpfs (skipped if
mounting is not allowed). Exits 1 unless all rows pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from udddm.testing import s3
from udddm.testing.faults import FaultProxy

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

SETTINGS = (
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0.1, "
    "condition: none}",
    "order={lanes: 4, chunk: 32, window: 2}",
    "train={steps: 260, batch_size: 64, learning_rate: 0.001, ema: [0.99]}",
    "checkpoint.every_steps=40",
    "sample.every_steps=0",
    "log_every_steps=5",
)
FOREVER = 10**9
FAULTS: tuple[tuple[str, str, int], ...] = (
    ("503 SlowDown, 12 times", "slow-down", 12),
    ("429 TooManyRequests, 12 times", "too-many", 12),
    ("500 InternalError, 12 times", "internal", 12),
    ("502 from a gateway, 12 times", "bad-gateway", 12),
    ("connection reset, 12 times", "reset", 12),
    ("reply cut in the middle, 12 times", "cut", 12),
    ("reply lost after the request, 12 times", "lost-reply", 12),
    ("request stalls, 2 times", "stall", 2),
    ("503 SlowDown that stays", "slow-down", FOREVER),
    ("connections reset that stay so", "reset", FOREVER),
    ("credentials expired", "expired-token", FOREVER),
    ("access denied", "access-denied", FOREVER),
    ("clock skewed", "clock", FOREVER),
    ("bucket vanished", "no-bucket", FOREVER),
)


@dataclass
class Row:
    fault: str
    outcome: str
    exit_code: int
    seconds: float
    """Seconds from the fault to the end of the run."""
    retries: int
    """Retries in the last line of metrics.jsonl."""
    error: str
    equal: bool
    """Whether the fingerprints are equal at the end, after resuming if the run had stopped."""
    secrets_kept: bool

    @property
    def good(self) -> bool:
        return self.equal and self.secrets_kept and not self.outcome.startswith("FAILED")


class Run:
    def __init__(self, directory: Path, url: str, environment: dict[str, str]):
        self.directory, self.url, self.log = directory, url, directory.with_suffix(".log")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "import sys; from udddm.cli.train import main; sys.exit(main())"]
        command += ["--run-dir", str(self.directory), "--device", "cpu", "--store", "zarr", "--store-url", self.url]
        for setting in SETTINGS:
            command += ["--set", setting]
        with self.log.open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=self.environment)

    def wait_for_a_checkpoint(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and not list(self.directory.glob("checkpoints/step-*/manifest.json")):
            time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit(f"the run ended before its first checkpoint:\n{self.log.read_text()}")

    def fingerprints(self) -> dict[str, str]:
        result = json.loads((self.directory / "result.json").read_text())
        return {key: value for key, value in result.items() if key.endswith("sha256")}

    def retries(self) -> int:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["store_retries"]) if lines else 0

    def error(self) -> str:
        lines = [line for line in self.log.read_text().splitlines() if "rror" in line]
        return lines[-1].replace(str(self.directory.parent), "...") if lines else ""

    def holds(self, secrets: list[str]) -> bool:
        texts = [self.log, *(p for p in self.directory.rglob("*") if p.suffix in (".json", ".jsonl", ".yaml"))]
        return any(secret in path.read_text() for path in texts for secret in secrets)


def judged(
    fault: str, run: Run, process: subprocess.Popen[bytes], began: float, passing: bool, fix: object, wanted: object
) -> Row:
    """Wait for the end of the run. If it stopped, remove the fault and resume."""
    try:
        code = process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = -1
    seconds, retries, error = time.monotonic() - began, run.retries(), "" if code == 0 else run.error()
    whole = "Traceback" not in run.log.read_text()
    assert callable(fix)
    fix()
    if code == 0:
        outcome = "went on" if passing else "FAILED: went on"
    elif code == 1 and whole:
        again = run.start().wait(300)
        outcome = "stopped, the last checkpoint resumed" if again == 0 else f"FAILED: resuming gave {again}"
        outcome = f"FAILED: {outcome}" if passing else outcome
    else:
        outcome = f"FAILED: exit code {code}, {'' if whole else 'a traceback'}"
    equal = (run.directory / "result.json").exists() and run.fingerprints() == wanted
    secrets = [run.environment[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")]
    return Row(fault, outcome, code, round(seconds, 1), retries, error, equal, not run.holds(secrets))


def on_s3(directory: Path, server: s3.S3Server, chosen: list[tuple[str, str, int]]) -> list[Row]:
    undisturbed = Run(directory / "undisturbed", f"s3://{s3.BUCKET}/undisturbed", server.environment())
    began = time.monotonic()
    if undisturbed.start().wait(600):
        raise SystemExit(f"the undisturbed run failed:\n{undisturbed.log.read_text()}")
    wanted = undisturbed.fingerprints()
    rows = [Row("none", "went on", 0, round(time.monotonic() - began, 1), undisturbed.retries(), "", True, True)]
    show(rows[-1])
    for number, (title, name, times) in enumerate(chosen):
        with FaultProxy(server.endpoint) as proxy:
            run = Run(directory / f"run-{number}", f"s3://{s3.BUCKET}/run-{number}", server.environment(proxy.url))
            process = run.start()
            run.wait_for_a_checkpoint(process)
            began = time.monotonic()
            proxy.fail(name, min(times, 100_000))
            rows.append(judged(title, run, process, began, times < FOREVER, proxy.heal, wanted))
        show(rows[-1])
    if (full := on_a_full_disk(directory, server, wanted)) is not None:
        rows.append(full)
        show(full)
    return rows


def on_a_full_disk(directory: Path, server: s3.S3Server, wanted: dict[str, str]) -> Row | None:
    disk = directory / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        print("the full disk is skipped: mounting a tmpfs is not allowed here")
        return None
    try:
        run = Run(directory / "run-disk", str(disk / "state"), server.environment())
        process = run.start()
        run.wait_for_a_checkpoint(process)
        began, ballast = time.monotonic(), disk / "ballast"
        space = os.statvfs(disk)
        ballast.write_bytes(bytes(space.f_bavail * space.f_frsize))
        return judged("disk full", run, process, began, False, ballast.unlink, wanted)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def show(row: Row) -> None:
    line = f"{row.fault:40} {row.outcome:37} {row.exit_code:4} {row.seconds:7.1f} {row.retries:8}"
    print(f"{line}  {'yes' if row.equal else 'NO':7}{'yes' if row.secrets_kept else 'NO'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only faults whose name contains one of these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.only or any(word in fault[0] for word in arguments.only)]
    head = about()
    print(heading(head))
    print(f"{'fault':40} {'outcome':37} {'exit':>4} {'seconds':>7} {'retries':>8}  equal  secrets kept", flush=True)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        rows = on_s3(directory, stack.enter_context(s3.running()), chosen)
    print("\nerror messages:")
    for row in rows:
        if row.error:
            print(f"  {row.fault}:\n    {row.error}")
    if arguments.json is not None:
        write_json(arguments.json, head, {"rows": [asdict(r) for r in rows]})
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
