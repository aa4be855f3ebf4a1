"""Messages of failed requests."""

from __future__ import annotations

import pytest

from udddm.storage.failures import of_obstore


def test_a_connection_that_fails_behind_a_proxy_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    refused = Exception("Generic S3 error: ... ConnectionRefused ...")
    assert str(of_obstore(refused, answered=False)) == "the server refuses connections"
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    message = str(of_obstore(refused, answered=False))
    assert "the server refuses connections (through the proxy of HTTP_PROXY; unset it" in message
    assert "secret" not in message
