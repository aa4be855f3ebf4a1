"""A real Ray cluster on this machine for tests and benchmarks, with a token made for it.

    with cluster.running(place, cpus=2) as ray:
        job = ray.submit("udddm-train", "--workers", "2", "--run-dir", str(run))
        said, _ = job.communicate()

Only its own processes are ended with it: those whose environment has the token.
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


@dataclass
class Cluster:
    """A head node and what its clients need to know."""

    environment: dict[str, str]
    """For clients: the address, and the token."""
    directory: Path
    """What is submitted with a job as its working directory."""

    address: str
    """Of the head, for other nodes."""
    short: Path
    """For directories whose sockets' names must not be long."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def submit(self, *command: str, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """`ray job submit` of a command: the process that shows its log and ends with it. `variables` are the job's."""
        whole = [str(BIN / "ray"), "job", "submit", "--working-dir", str(self.directory)]
        whole += ["--runtime-env-json", json.dumps({"env_vars": variables or {}}), "--", *command]
        return subprocess.Popen(
            whole, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def call(self, *arguments: str) -> str:
        """What `ray ARGUMENTS` prints."""
        done = subprocess.run(
            [str(BIN / "ray"), *arguments], env=self.environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout

    def add_node(self, cpus: int) -> None:
        """Another node, as processes of this machine."""
        command = [str(BIN / "ray"), "start", "--block", f"--address={self.address}", f"--num-cpus={cpus}"]
        # A directory of its own, or it would empty the one that the jobs on the head work in.
        command += [f"--temp-dir={tempfile.mkdtemp(prefix='ray-', dir=self.short)}"]
        with (self.directory.parent / f"node-{len(self.nodes)}.log").open("wb") as log:
            environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
            self.nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def lose_node(self, number: int) -> None:
        """SIGKILL to all processes of a node that was added, as if its machine had lost its power."""
        pids = [self.nodes[number].pid]
        for pid in pids:  # grows while it is walked
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pids += [int(child) for child in (task / "children").read_text().split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes[number].wait()

    def metrics(self) -> str:
        """What the nodes' Prometheus endpoints say now."""
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
        """The pids of this cluster's training workers."""
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
        """Kill what is left of it."""
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(place: Path, cpus: int, **variables: str) -> Iterator[Cluster]:
    """A head node on loopback, ready for jobs. `variables` are added to its environment and so to the jobs'."""
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
    short = Path(tempfile.mkdtemp(prefix="udddm-"))
    cluster = Cluster(environment, work, f"127.0.0.1:{port}", short)
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={port}"]
    command += [f"--temp-dir={short / 'head'}"]
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
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            cluster.end()
            process.wait()
            for node in cluster.nodes:
                node.wait()
            shutil.rmtree(short, ignore_errors=True)
