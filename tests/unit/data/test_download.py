"""Downloads from a local server: complete and verified, or an error without leftovers."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from udddm.data.download import cache_directory, fetch
from udddm.errors import DataError

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several blocks
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path in ("/404", "/500"):
            self.send_error(int(self.path[1:]))
            return
        self.send_response(200)
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/silent":
            self.server.released.wait(10)  # type: ignore[attr-defined]
            return
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Handler, "requests", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.released = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.released.set()  # type: ignore[attr-defined]
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/file", "/unannounced"])
def test_a_download_is_complete(server: str, tmp_path: Path, path: str) -> None:
    destination = tmp_path / "new" / "file.gz"
    assert fetch(server + path, destination, MD5) == destination
    assert destination.read_bytes() == CONTENT
    assert list(destination.parent.iterdir()) == [destination]


def test_an_existing_file_is_downloaded_again_only_if_corrupt(server: str, tmp_path: Path) -> None:
    destination = tmp_path / "file.gz"
    for before, requests in ((CONTENT, 0), (CONTENT[:-1], 1)):
        destination.write_bytes(before)
        fetch(f"{server}/file", destination, MD5)
        assert destination.read_bytes() == CONTENT
        assert Handler.requests == requests


@pytest.mark.parametrize(
    ("path", "md5", "message"),
    [
        ("/file", "0" * 32, f"has the MD5 {MD5} instead of {'0' * 32}"),
        ("/cut", MD5, f"ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes: try again"),
        ("/404", MD5, "the server responded with 404"),
        ("/500", MD5, "the server responded with 500"),
        ("/silent", MD5, "timed out"),
    ],
)
def test_a_failed_download_is_reported_and_leaves_no_file(
    server: str, tmp_path: Path, path: str, md5: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        fetch(server + path, tmp_path / "file.gz", md5, timeout=0.5)
    assert server + path in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_the_existing_file(server: str, tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(b"older")
    with pytest.raises(DataError):
        fetch(f"{server}/cut", tmp_path / "file.gz", MD5)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]


def test_an_interrupted_download_leaves_no_file(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("udddm.data.download._transfer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server}/file", tmp_path / "file.gz", MD5)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match=r"downloading http://127\.0\.0\.1:1/x failed: .*manually and set data\.path"):
        fetch("http://127.0.0.1:1/x", tmp_path / "x", MD5)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot write to .*set XDG_CACHE_HOME"):
        fetch("http://127.0.0.1:1/x", tmp_path / "file" / "x", MD5)


def test_several_processes_can_download_the_same_file(server: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(f"{server}/file", tmp_path / "file.gz", MD5), range(4)))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [CONTENT]


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (("/var/x", Path("/var/x/udddm")), ("", tmp_path / ".cache/udddm")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_directory() == expected
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache/udddm"
