"""An HTTP proxy in front of an S3 server that injects faults by name.

    with s3.running() as server, FaultProxy(server.endpoint) as proxy:
        os.environ.update(server.environment(proxy.url))
        objects = open_object_store(f"s3://{s3.BUCKET}/some/prefix")
        proxy.fail("slow-down", times=2)
        proxy.fail("lost-reply", method="PUT")
        objects.put("key", b"bytes")
        assert (objects.retries, proxy.failed) == (3, 3)

Use it to test how a client handles real replies and broken connections. Code above the client is tested faster with the
errors of `udddm.testing.objects.FaultyObjectStore`.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERRORS = {
    "slow-down": (503, "SlowDown", "Please reduce your request rate."),
    "too-many": (429, "TooManyRequests", "Rate exceeded."),
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "bad-gateway": (502, "", ""),
    "expired-token": (400, "ExpiredToken", "The provided token has expired."),
    "expired-token-403": (403, "ExpiredToken", "The provided token has expired."),
    "access-denied": (403, "AccessDenied", "Access Denied"),
    "signature": (403, "SignatureDoesNotMatch", "The request signature does not match."),
    "unknown-key": (403, "InvalidAccessKeyId", "The access key id does not exist in our records."),
    "no-bucket": (404, "NoSuchBucket", "The specified bucket does not exist"),
    "clock": (403, "RequestTimeTooSkewed", "The difference between the request time and the server's is too large."),
}
"""Error replies of the proxy, whose requests never reach the server. Like those of AWS, they repeat the sender's key
id, signature and token."""

BROKEN = ("reset", "cut", "stall", "lost-reply")
"""The connection is reset before the request is passed on; the reply ends early; there is no reply; the request takes
effect and the connection is reset instead of the reply."""


class FaultProxy:
    """A context manager that forwards requests to `url` to the server at `upstream`."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream).netloc
        self.latency = 0.0  # seconds before each request is passed on
        self.stall = 30.0  # seconds that a stalled request hangs, unless the proxy ends earlier
        self.requests: list[str] = []  # their methods, in order of arrival
        self.failed = 0  # injected failures so far
        self._faults: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def log_message(self, format: str, *arguments: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, address: object) -> None:
                return  # the client disconnected, as these tests cause it to

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail(self, name: str, times: int = 1, method: str = "") -> None:
        """Let the next `times` requests (of the HTTP method, if given) fail with the fault `name` of ERRORS or BROKEN.

        Raises ValueError if there is no such fault.
        """
        if name not in ERRORS and name not in BROKEN:
            raise ValueError(f"no fault {name!r}: there are {', '.join([*ERRORS, *BROKEN])}")
        with self._lock:
            self._faults += [(name, method)] * times

    def heal(self) -> None:
        """Cancel the faults that have not occurred yet."""
        with self._lock:
            self._faults.clear()

    @contextmanager
    def failing(self, name: str, times: int = 1, method: str = "") -> Iterator[None]:
        """Same as `fail`, but only until the end of the block."""
        self.fail(name, times, method)
        try:
            yield
        finally:
            self.heal()

    def _next_fault(self, method: str) -> str:
        with self._lock:
            self.requests.append(method)
            for index, (name, wanted) in enumerate(self._faults):
                if wanted in ("", method):
                    del self._faults[index]
                    self.failed += 1
                    return name
        return ""

    def _handle(self, client: BaseHTTPRequestHandler) -> None:
        body = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        fault = self._next_fault(client.command)
        if self.latency:
            time.sleep(self.latency)
        if fault in ERRORS:
            self._refuse(client, *ERRORS[fault])
        elif fault == "reset":
            self._reset(client)
        elif fault == "stall":
            self._over.wait(self.stall)
            client.close_connection = True
        else:
            status, headers, reply = self._forward(client, body)
            if fault == "lost-reply":
                self._reset(client)
                return
            client.send_response_only(status)
            for name, value in headers:
                client.send_header(name, value)
            client.end_headers()
            if fault == "cut":
                client.wfile.write(reply[: len(reply) // 2])
                client.close_connection = True
            else:
                client.wfile.write(reply)

    def _forward(self, client: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        connection.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
        for name, value in client.headers.items():  # including the host, which is signed
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        reply = response.read()
        headers = [
            (n, v)
            for n, v in response.getheaders()
            if n.lower() not in ("transfer-encoding", "connection", "content-length")
        ]
        length = response.getheader("Content-Length") if client.command == "HEAD" else str(len(reply))
        connection.close()
        return response.status, [*headers, ("Content-Length", length or "0")], reply

    def _refuse(self, client: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
        signed = client.headers.get("Authorization", "")
        token = client.headers.get("x-amz-security-token", "")
        reply = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
            f"<AWSAccessKeyId>{signed}</AWSAccessKeyId><Token-0>{token}</Token-0><RequestId>7</RequestId></Error>"
        ).encode()
        if client.command == "HEAD" or not code:
            reply = b""
        client.send_response_only(status)
        client.send_header("Content-Type", "application/xml")
        client.send_header("Content-Length", str(len(reply)))
        client.end_headers()
        client.wfile.write(reply)

    def _reset(self, client: BaseHTTPRequestHandler) -> None:
        # With a linger time of 0, close sends a reset instead of an orderly shutdown.
        client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close_connection = True
