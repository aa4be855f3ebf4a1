"""`udddm export --repo` and `hf://`, against a server on the loopback interface with the requests of the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from udddm.testing.models import random_model, saved

pytest.importorskip("huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """One repository, in memory: creation, upload without LFS, and download."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []
    commit = "0123456789abcdef0123456789abcdef01234567"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, content in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/someone/refused/" in self.path:
            self.answer({"error": "You may not write to this repository"}, 403)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/someone/model/commit/{self.commit}"
            self.answer({"commitOid": self.commit, "commitUrl": url, "success": True})
        else:
            self.answer({"url": f"http://{self.headers['Host']}/someone/model", "name": "someone/model"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path, marker = self.path.partition("?")[0], "/resolve/"
        if marker in path:
            data = self.files.get(path.partition(marker)[2].partition("/")[2])
            if data is None:
                return self.send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.send(data, 200, {"ETag": tag, "X-Repo-Commit": self.commit})
        if "/tree/" in path:
            return self.answer(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in self.files.items()
                ]
            )
        siblings = [{"rfilename": name} for name in self.files]
        return self.answer({"id": "someone/model", "sha": self.commit, "siblings": siblings, "private": False})


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


COMMANDS = """
import sys
import huggingface_hub.constants
from udddm.cli.main import main

release = sys.argv[1]
print("codes", main(["export", release, "--to", "hub", "--out", "out", "--repo", "someone/model"]))
print("codes", main(["sample", "hf://someone/model", "--count", "4", "--out", "online", "--device", "cpu"]))
huggingface_hub.constants.HF_HUB_OFFLINE = True
print("codes", main(["sample", "hf://someone/model", "--count", "4", "--out", "offline", "--device", "cpu"]))
huggingface_hub.constants.HF_HUB_OFFLINE = False
print("codes", main(["export", release, "--to", "hub", "--out", "kept", "--repo", "someone/refused"]))
"""


def test_a_model_goes_to_the_hub_and_comes_back(endpoint: str, tmp_path: Path) -> None:
    """Only the configuration and the weights are downloaded, and the second time nothing is needed but the cache."""
    model = random_model("network={base_channels: 8, channel_mult: [1], condition: none}", "ema=0.9")
    saved(model, tmp_path / "release")
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-c", COMMANDS, str(tmp_path / "release")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    assert re.findall(r"^codes (\d)$", done.stdout, re.M) == ["0", "0", "0", "1"], done.stderr
    assert "udddm.load_model('hf://someone/model')" in done.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == Hub.files
    fetched = {line.rpartition("/")[2] for line in Hub.requests if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"config.json", "ema-0.9.safetensors"}
    for name in ("online", "offline"):
        assert np.array_equal(np.load(tmp_path / name / "samples.npy"), model.sample(range(4)))
    assert "cannot upload to someone/refused (" in done.stderr and "hf upload someone/refused kept" in done.stderr
    assert (tmp_path / "kept" / "README.md").exists() and "Traceback" not in done.stderr
