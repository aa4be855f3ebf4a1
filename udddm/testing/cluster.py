"""A real Ray cluster on this machine for tests and benchmarks, with its own generated token.

    with cluster.running(place, cpus=2) as ray:
        job = ray.submit("udddm-train", "--workers", "2", "--run-dir", str(run))
        said, _ = job.communicate()

It ends only its own processes: those with the token in their environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
LONGEST = 20
"""Characters. Ray adds about 80 to a directory for the names of its sockets, which have at most 107."""


@dataclass
class Cluster:
    """A head node and the settings that its clients need."""

    environment: dict[str, str]
    """Environment for clients: the address and the token."""
    directory: Path
    """Directory that is submitted with a job as its working directory."""

    address: str
    """Address of the head node, for other nodes."""
    short: Path
    """Short path for directories with sockets, whose names are limited in length."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def submit(self, *command: str, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Run `ray job submit` for a command. Returns the process, which prints the job's log and ends with the job.
        `variables` are added to the job's environment."""
        arguments = [str(BIN / "ray"), "job", "submit", "--working-dir", str(self.directory)]
        arguments += ["--runtime-env-json", json.dumps({"env_vars": variables or {}}), "--", *command]
        return subprocess.Popen(
            arguments, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def call(self, *arguments: str) -> str:
        """The output of `ray ARGUMENTS`."""
        done = subprocess.run(
            [str(BIN / "ray"), *arguments], env=self.environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout

    def add_node(self, cpus: int) -> None:
        """Add a node, as processes of this machine."""
        command = [str(BIN / "ray"), "start", "--block", f"--address={self.address}", f"--num-cpus={cpus}"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        # A separate directory, else it would empty the one in which the jobs on the head run.
        command += [f"--temp-dir={tempfile.mkdtemp(prefix='ray-', dir=self.short)}"]
        with (self.directory.parent / f"node-{len(self.nodes)}.log").open("wb") as log:
            environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
            self.nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def lose_node(self, number: int) -> None:
        """Send SIGKILL to all processes of an added node, as if its machine had lost power."""
        pids = [self.nodes[number].pid]
        for pid in pids:  # grows during the iteration
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pids += [int(child) for child in (task / "children").read_text().split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes[number].wait()

    def metrics(self) -> str:
        """The current output of the nodes' Prometheus endpoints."""
        listed = self.short / "head" / "prom_metrics_service_discovery.json"
        targets = [t for group in json.loads(listed.read_text()) for t in group["targets"]] if listed.exists() else []
        found = []
        for target in targets:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as reply,
            ):
                found.append(reply.read().decode())
        return "\n".join(found)

    def workers(self) -> list[int]:
        """The process ids of this cluster's training workers."""
        return self._processes(b"ray::RayTrainWorker")

    def _processes(self, name: bytes = b"") -> list[int]:
        token = self.environment["RAY_AUTH_TOKEN"].encode()
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if (directory / "cmdline").read_bytes().startswith(name) and (
                    token in (directory / "environ").read_bytes()
                ):
                    found.append(int(directory.name))
            except OSError:
                continue
        return sorted(found)

    def end(self) -> None:
        """Kill all processes, also those that a process starts meanwhile."""
        while found := self._processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(place: Path, cpus: int, **variables: str) -> Iterator[Cluster]:
    """Run a head node on loopback, ready for jobs. `variables` are added to its environment and so to the jobs'.

    Raises RuntimeError if it does not start.
    """
    dashboard = free_port()
    environment = {
        **os.environ,
        **variables,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    head = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    work = place / "work"
    work.mkdir(parents=True)
    port = free_port()
    long = len(tempfile.gettempdir()) > LONGEST  # of TMPDIR, which Ray refuses for its sockets
    short = Path(tempfile.mkdtemp(prefix="udddm-", dir="/tmp" if long else None))
    cluster = Cluster(environment, work, f"127.0.0.1:{port}", short)
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={port}"]
    command += [f"--temp-dir={short / 'head'}"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # without it, a second cluster's agent has no port
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    with (place / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=head, stdout=log, stderr=log, cwd=place)
        try:
            deadline = time.monotonic() + 90
            listing = [str(BIN / "ray"), "job", "list"]
            while subprocess.run(listing, env=environment, capture_output=True, timeout=60).returncode:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the head node did not start:\n{(place / 'head.log').read_text()}")
                time.sleep(0.5)
            yield cluster
        finally:
            process.kill()  # at once, because nothing of it need survive; a stop by SIGTERM takes ten seconds
            process.wait()
            cluster.end()
            for node in cluster.nodes:
                node.wait()
            shutil.rmtree(short, ignore_errors=True)
