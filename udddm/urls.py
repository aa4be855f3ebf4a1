"""Secrets in URLs. URLs are written to run.json, config.yaml and every checkpoint, and appear in messages."""

from __future__ import annotations

import re

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})([^\s'\"]*)")


def secret_in(text: str) -> str:
    """The part of a URL in `text` that is or may be secret: "user name or password", "query", or "part after #".

    Returns "" if there is none, and for a local path.
    """
    for scheme, rest in _URL.findall(text):
        if scheme.lower() in ("file:/", "file://"):
            continue
        user, at, _ = rest.rpartition("@")  # the last one: a password may contain a slash or another @
        if at and (":" in user or (scheme.lower().startswith("s3") and "/" not in user)):
            return "user name or password"
        if mark := re.search(r"[?#].", rest):
            return "query" if mark[0][0] == "?" else "part after #"
    return ""


def redact(text: str) -> str:
    """The message with the user names, passwords and queries of its URLs replaced by ***."""

    def shown(match: re.Match[str]) -> str:
        scheme, rest = match.groups()
        if not secret_in(match[0]):
            return match[0]
        user, at, place = rest.rpartition("@")
        if not at or (":" not in user and "/" in user):
            user, at, place = "", "", rest
        return scheme + ("***@" if at else "") + re.sub(r"([?#]).+", r"\1***", place)

    return _URL.sub(shown, text)
