"""A page of an exported folder in headless Chromium, served on the loopback interface."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser, or None if none is installed."""
PAGE = "index.html"
_REPORT = """<script>
const report = (value) => fetch("result", { method: "POST", body: JSON.stringify(value) });
addEventListener("unhandledrejection", (event) => report({ error: String(event.reason) }));
addEventListener("error", (event) => report({ error: event.message }));
"""


@dataclass
class _Answer:
    """What the page has reported."""

    value: Any = None
    given: threading.Event = field(default_factory=threading.Event)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder. The page's response ends once the page has reported, so that only then it counts as loaded."""

    def __init__(self, *arguments: Any, script: str, answer: _Answer, wait: float, directory: str):
        self.script, self.answer, self.wait = script, answer, wait
        super().__init__(*arguments, directory=directory)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        if self.path != f"/{PAGE}":
            return super().do_GET()
        page = (Path(self.directory) / PAGE).read_text()
        start, _, end = page.rpartition("</body>")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(f"{start}{_REPORT}{self.script}</script>".encode())
        self.wfile.flush()
        self.answer.given.wait(self.wait)
        self.wfile.write(f"</body>{end}".encode())
        return None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.answer.given.is_set():
            self.answer.value = json.loads(body)
        self.send_response(204)
        self.end_headers()
        self.answer.given.set()


@contextmanager
def _serving(folder: Path, script: str, answer: _Answer, wait: float) -> Iterator[str]:
    handler = partial(_Handler, script=script, answer=answer, wait=wait, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/{PAGE}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_page(
    folder: Path, script: str, *, screenshot: Path | None = None, size: str = "820,900", wait: float = 60
) -> tuple[Any, list[str]]:
    """Open `folder/index.html` in Chromium, add `script` to it, and wait until that calls `report(value)`.

    Returns the value, {"error": ...} after an uncaught error, and None if the page did not report within `wait`
    seconds; and the lines of the browser's console. `screenshot` is a PNG of the page after that. Raises
    FileNotFoundError without a browser.
    """
    if CHROMIUM is None:
        raise FileNotFoundError("there is no Chromium")
    answer = _Answer()
    with tempfile.TemporaryDirectory() as profile, _serving(folder, script, answer, wait) as address:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        command += [f"--user-data-dir={profile}", f"--window-size={size}", "--hide-scrollbars"]
        command += [f"--screenshot={screenshot or Path(profile) / 'page.png'}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=wait + 60)
    return answer.value, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
