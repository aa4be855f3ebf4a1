"""A real S3 server for tests and benchmarks: SeaweedFS on loopback, with credentials made for this run."""

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
    endpoint: str
    key: str
    secret: str

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a client needs to know; `endpoint` when it is to go through a proxy."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }


def _ports(count: int) -> list[int]:
    """Free ports whose neighbours 10,000 above, where each service has its gRPC twin, are free too."""
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
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextmanager
def running(binary: str) -> Iterator[S3Server]:
    """A server on free ports, in memory where there is such a file system."""
    key, secret = f"KEY{secrets.token_hex(8).upper()}", secrets.token_hex(20)
    shared = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="udddm-s3-", dir=shared if shared.is_dir() else None))
    identity = {
        "name": "test",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = dict(zip(("master", "volume", "filer", "s3", "admin"), _ports(5), strict=True))
    command = [binary, "mini", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += [f"-s3.config={directory / 's3.json'}", "-master.telemetry=false", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-volume.preStopSeconds=1"]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
    try:
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        _wait_until_ready(endpoint, server, directory / "log")
        yield S3Server(endpoint, key, secret)
    finally:
        server.kill()  # nothing in it is to last
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_until_ready(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        text = log.read_text(errors="replace")
        if "components are running" in text:
            try:
                urllib.request.urlopen(endpoint, timeout=2).close()
            except urllib.error.HTTPError as error:
                error.close()
                return  # it answers: that this request is not signed
            except OSError:
                pass
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text(errors='replace')[-2000:]}")
