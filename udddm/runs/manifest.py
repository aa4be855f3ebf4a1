"""A checkpoint's manifest: the size and CRC32C of every file. It may come from a stranger, so it is checked."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import google_crc32c

Entries = dict[str, dict[str, int]]
"""The size `bytes` and the `crc32c` of every file, keyed by its path in the checkpoint."""

MANIFEST = "manifest.json"
LARGEST = 64 << 20
"""Largest manifest that is read, in bytes: one with about 700,000 files."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"{_PART}|state(/{_PART})+")
"""The names that this package writes: files in the checkpoint and under `state`. This excludes `..`, absolute paths
and backslashes."""


def dumps(entries: Entries) -> str:
    """The manifest's text. Its entry for itself holds the number of the other entries and their checksum."""
    return json.dumps({**entries, MANIFEST: _own(entries)}, indent=1) + "\n"


def _own(entries: Entries) -> dict[str, int]:
    body = json.dumps(entries, sort_keys=True).encode()
    return {"bytes": len(entries), "crc32c": int(google_crc32c.value(body))}


def parse(data: bytes) -> Entries:
    """Parse a manifest into the entries of all other files.

    Raises ValueError if `data` is not a manifest, does not match its own checksum (older versions have none), or
    contains a name that this package does not write.
    """
    try:
        entries = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError(f"it is a {type(entries).__name__}, not a mapping of files")  # noqa: TRY004
    own = entries.pop(MANIFEST, None)
    if not entries:
        raise ValueError("it names no file")
    if own is not None and own != _own(entries):
        raise ValueError("it does not match its own checksum")
    for name, entry in entries.items():
        if not allowed(name):
            raise ValueError(f"it names {name!r}, which is not a checkpoint file: do not use this checkpoint")
        if not isinstance(entry, dict) or not all(_is_number(entry.get(key)) for key in ("bytes", "crc32c")):
            raise ValueError(f"its entry for {name} lacks a number for bytes or crc32c")
    for name in entries:
        if inside := next((name[:i] for i, c in enumerate(name) if c == "/" and name[:i] in entries), None):
            raise ValueError(f"it names {inside} as a file and as the directory of {name}")
    return entries


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def allowed(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name: at the top level or under `state`, and not the manifest."""
    return name != MANIFEST and _NAME.fullmatch(name) is not None


def read(directory: Path) -> Entries:
    """Read the manifest of a checkpoint on this machine. Raises ValueError, OSError."""
    path = directory / MANIFEST
    if problem := not_plain(directory, MANIFEST):
        raise ValueError(problem)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {LARGEST}")
    return parse(path.read_bytes())


def not_plain(directory: Path, name: str) -> str:
    """Why `name` in a checkpoint is not a plain file but a link, device or pipe; "" if it is a plain file.

    Raises FileNotFoundError if it does not exist.
    """
    path = directory / name
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode) or path.resolve() != directory.resolve() / name:
        return f"{path} is a link or in a linked directory; a checkpoint holds plain files"
    return "" if stat.S_ISREG(mode) else f"{path} is not a plain file"
