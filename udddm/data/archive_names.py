"""Checks of the names and types of the members of an archive from elsewhere.

Nothing is ever extracted. The checks keep names out of messages and outputs that a careless program would follow.
"""

from __future__ import annotations

import stat

from udddm.errors import DataError

MEMBERS = 50_000_000
"""Members that an archive may have."""
LONGEST_NAME = 4096


def check_name(name: str, archive: str) -> None:
    """Raise DataError for the name of a member that leads out of a directory, or that no writer produces."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or (len(name) > 1 and name[1] == ":"):
        raise DataError(f"{archive} has the member {name[:200]!r}, which leads out of the archive: it is not read")
    if not name or len(name) > LONGEST_NAME or any(ord(letter) < 32 for letter in name):
        raise DataError(f"{archive} has a member whose name is not valid: {name[:200]!r}")


def check_mode(mode: int, name: str, archive: str) -> None:
    """Raise DataError unless the Unix mode of a member is that of a file or directory, or says neither."""
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{archive} has the member {name!r}, which is a link or device: only files are read")
