"""Checkpoints made to execute code, write files or exhaust the machine of whoever opens them.

    python benchmarks/robustness/hostile_checkpoints.py --json benchmarks/results/hostile-checkpoints.json

Each shape is a run with one thing changed and its manifest updated to match. `udddm sample`, `udddm evaluate` and
`udddm store info`, `view`, `verify` and `convert` open it, some of them through HTTP. Nothing may be executed, nothing
outside the output directory may change, and the commands that use the changed thing must refuse it with one error that
names it. Address space is limited to 12 GB, and each command to a minute. Exits 1 unless all shapes pass.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

from udddm.runs.manifest import dumps, parse

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

WEIGHTS = "ema-0.99.safetensors"
MEMORY = 12 << 30
Change = Callable[[Path], None]


@dataclass
class Row:
    shape: str
    refused_by: list[str]
    error: str
    problems: list[str]


class Executes:
    """Its pickle creates the file `canary` when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def seal(checkpoint: Path) -> None:
    """Make the manifest match the files."""
    entries = {}
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            data = path.read_bytes()
            entries[str(path.relative_to(checkpoint))] = {
                "bytes": len(data),
                "crc32c": int(google_crc32c.value(data)),
            }
    (checkpoint / "manifest.json").write_text(dumps(entries))


def configured(**sections: dict[str, Any]) -> Change:
    """Change keys of the configuration in the run and in the checkpoint."""

    def change(checkpoint: Path) -> None:
        for path in (checkpoint / "config.json", checkpoint.parents[1] / "run.json"):
            found = json.loads(path.read_text())
            for section, values in sections.items():
                found["config"][section] |= values
            path.write_text(json.dumps(found))
        seal(checkpoint)

    return change


def shaped(*shape: int) -> Change:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": shape}))
        seal(checkpoint)

    return change


def replaced(name: str, data: bytes) -> Change:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(data)
        if name != "manifest.json":
            seal(checkpoint)

    return change


def weights(header: bytes, length: int | None = None, data: bytes = b"abcd") -> Change:
    return replaced(WEIGHTS, struct.pack("<Q", len(header) if length is None else length) + header + data)


def named(name: str) -> Change:
    """Add a file to the manifest that is to be written somewhere else."""

    def change(checkpoint: Path) -> None:
        data = b"written by the checkpoint\n"
        entries = parse((checkpoint / "manifest.json").read_bytes())
        entries[name] = {"bytes": len(data), "crc32c": int(google_crc32c.value(data))}
        (checkpoint / "manifest.json").write_text(dumps(entries))

    return change


def linked(target: str, *, sealed: bool) -> Change:
    def change(checkpoint: Path) -> None:
        (checkpoint / WEIGHTS).unlink()
        (checkpoint / WEIGHTS).symlink_to(target)
        if sealed:
            seal(checkpoint)

    return change


def pipe(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    os.mkfifo(checkpoint / WEIGHTS)


def not_finite(checkpoint: Path) -> None:
    found = load_file(checkpoint / WEIGHTS)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in found.items()}, checkpoint / WEIGHTS)
    seal(checkpoint)


def pickled_rows(checkpoint: Path) -> None:
    for path in checkpoint.glob("state/lane-*-window-*.npy"):
        np.save(path, np.array([Executes()], dtype=object), allow_pickle=True)
    seal(checkpoint)


def announced_smaller(checkpoint: Path) -> None:
    """The server sends more than the manifest states."""
    entries = parse((checkpoint / "manifest.json").read_bytes())
    entries[WEIGHTS]["bytes"] = 100
    (checkpoint / "manifest.json").write_text(dumps(entries))


DEEP = b"[" * 200_000 + b"]" * 200_000
HUGE = b'{"a":{"dtype":"F32","shape":[4611686018427387904,4611686018427387904],"data_offsets":[0,4]}}'
NEGATIVE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'
ALL = ("sample", "evaluate", "info", "view", "verify", "convert")
SHAPES: dict[str, tuple[Change, tuple[str, ...], str]] = {
    "code as the data set": (configured(data={"name": "stranger:images"}), ("evaluate",), "data.name"),
    "a file of this machine as the data set": (
        configured(data={"name": "array", "path": "/etc/passwd"}),
        ("evaluate",),
        "data.path",
    ),
    "code as the network": (configured(network={"name": "stranger:make"}), ("sample",), "network.name"),
    "code as the schedule": (configured(schedule={"kind": "stranger:make"}), ("sample",), "schedule.kind"),
    "code as features and metrics": (
        configured(evaluate={"features": "stranger:features", "metrics": ["stranger:metric"]}),
        (),
        "",
    ),
    "code as objective and sampler": (
        configured(objective={"name": "stranger:make"}, sample={"sampler": "stranger:make"}),
        (),
        "",
    ),
    "a pickle as weights": (replaced(WEIGHTS, pickle.dumps(Executes())), ("sample",), WEIGHTS),
    "a pickle as rows of the state": (pickled_rows, ("verify",), "window"),
    "a manifest that names ../": (named("config/../../../../escaped"), ("sample over HTTP",), "manifest"),
    "a manifest that names an absolute path": (named("/tmp/escaped"), ("sample over HTTP",), "manifest"),
    "a manifest that names ..\\": (named("..\\..\\escaped"), ("sample over HTTP",), "manifest"),
    "weights that are a link to a file": (linked("../../../../secret", sealed=True), ("sample",), WEIGHTS),
    "weights that are a link to a device": (linked("/dev/zero", sealed=False), ("sample",), WEIGHTS),
    "weights that are a pipe": (pipe, ("sample",), WEIGHTS),
    "a server that sends more than announced": (announced_smaller, ("sample over HTTP",), WEIGHTS),
    "weights with a header of 2^63 bytes": (weights(b"{}", 2**63), ("sample",), WEIGHTS),
    "weights with a header beyond the file": (weights(b"{}", 99_000_000), ("sample",), WEIGHTS),
    "weights whose size overflows": (weights(HUGE), ("sample",), WEIGHTS),
    "weights at a negative offset": (weights(NEGATIVE), ("sample",), WEIGHTS),
    "weights that are not numbers": (not_finite, ("sample",), "finite"),
    "images of 10^18 pixels": (shaped(1, 10**9, 10**9), ("sample",), ""),
    "a network of 10^9 channels": (configured(network={"base_channels": 10**9}), ("sample",), ""),
    "a schedule of 10^12 steps": (configured(schedule={"timesteps": 10**12}), (), ""),
    "a configuration 200,000 levels deep": (replaced("config.json", DEEP), ("sample",), "config.json"),
    "a manifest 200,000 levels deep": (replaced("manifest.json", DEEP), ("sample",), "manifest.json"),
}
"""The change, the commands that must refuse it, and what their error must name."""


def limited(command: list[str], log: str, where: str) -> None:
    """The child process: the address space is limited, then the command runs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tiny_runs.run_command(command[0], command[1:], log, {"PYTHONPATH": where, "HOME": where}, where)


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """A web server for a directory."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Say nothing of a client that hangs up, which a victim should do."""

    handler = functools.partial(Quiet, directory=str(directory))
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Victim:
    def __init__(self, place: Path):
        place.mkdir()
        self.place = place
        marks = "from pathlib import Path\nPath('canary').touch()\nimages = make = features = metric = None\n"
        (place / "stranger.py").write_text(marks)
        (place / "mine.py").write_text("def features(batch): return batch.flatten(1)[:, :8]\n")
        (place / "secret").write_text("a secret\n")
        (place / "out").mkdir()

    def command(self, name: str, run: str) -> list[str]:
        out = str(self.place / "out" / name.replace(" ", "-"))
        return {
            "sample": ["sample", "--checkpoint", run, "--seeds", "0-3", "--out", out, "--device", "cpu"],
            "evaluate": [
                *("evaluate", "--checkpoint", run, "--count", "8", "--features", "mine:features"),
                *("--device", "cpu", "--cache", out),
            ],
            "info": ["store", "info", run],
            "view": ["store", "view", run, "--sample", "3", "--out", f"{out}.png"],
            "verify": ["store", "verify", run],
            "convert": ["store", "convert", run, f"{out}-copy"],
        }[name.partition(" ")[0]]

    def files(self) -> dict[str, str]:
        """Everything except the output directory, with the links unfollowed."""
        found = {}
        for path in self.place.rglob("*"):
            name = path.relative_to(self.place)
            if name.parts[0] not in ("out", "logs", "__pycache__") and path.is_file() and not path.is_symlink():
                found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def said(log: Path, *, report: bool) -> list[str]:
    """The errors of a command. Those of `verify` are its report, of which the first line counts."""
    found = tiny_runs.errors(log)
    return found if found or not report else log.read_text().splitlines()[:1]


def attack(shape: str, victim: Victim, run: Path) -> Row:
    change, refusing, word = SHAPES[shape]
    row = Row(shape, [], "", [])
    shutil.copytree(run, victim.place / "theirs" / "run", symlinks=True)
    change(max((victim.place / "theirs" / "run" / "checkpoints").iterdir()))
    (victim.place / "logs").mkdir()
    before = victim.files()
    with served(victim.place / "theirs") as url:
        for name in ALL if change is pipe else (*ALL, "sample over HTTP"):  # the server would read the pipe
            log = victim.place / "logs" / f"{name}.txt"
            where = f"{url}/run" if "HTTP" in name else str(victim.place / "theirs" / "run")
            passed = (victim.command(name, where), str(log), str(victim.place))
            child = tiny_runs.FORKS.Process(target=limited, args=passed)
            child.start()
            code, found = tiny_runs.wait(child, 60), said(log, report=name == "verify")
            if code not in (0, 1, 2) or "traceback" in found or (code and len(found) != 1):
                row.problems.append(f"{name}: exit code {code}, {log.read_text()[-300:]!r}")
            elif code:
                row.refused_by.append(name)
            if name in refusing:
                row.error = row.error or (found[0].replace(str(victim.place), "...") if found else "")
                if not code or not found or word not in found[0]:
                    row.problems.append(f"{name} did not refuse {word or 'it'}: exit code {code}, {found}")
    if (victim.place / "canary").exists():
        row.problems.append("CODE WAS EXECUTED")
    if changed := victim.files().items() ^ before.items():
        row.problems.append(f"changed: {min(changed)[0]}")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only shapes that contain one of these")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    tiny_runs.start_fork_server()
    head = about()
    lines = [heading(head)]
    print(lines[0], flush=True)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        run, log = Path(name) / "run", Path(name) / "run.log"
        if tiny_runs.run("train", tiny_runs.train_arguments(run, "checkpoint.every_steps=14", steps=14), log):
            raise SystemExit(log.read_text())
        for number, shape in enumerate(SHAPES):
            if arguments.only and not any(word in shape for word in arguments.only):
                continue
            row = attack(shape, Victim(Path(name) / str(number)), run)
            rows.append(row)
            outcome = f"refused by {', '.join(row.refused_by) or 'none'}"
            lines.append(f"{shape:42}{'; '.join(row.problems) or outcome}")
            print(lines[-1], flush=True)
    lines.append(f"{len(rows)} shapes, {sum(not row.problems for row in rows)} passed; the first error of each:")
    lines += [f"  {row.shape}:\n    {row.error}" for row in rows if row.error]
    print("\n".join(lines[len(rows) + 1 :]))
    write_report(arguments.json, head, {"shapes": [asdict(row) for row in rows]}, lines)
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
