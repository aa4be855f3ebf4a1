"""Paths of this machine as people write them."""

from __future__ import annotations

import re
from pathlib import Path

from udddm.errors import ConfigError

_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:)/(?!/)(.*)", re.DOTALL)


def expanded(path: str | Path) -> Path:
    """A path with its `~` replaced by the home directory, which shells leave alone in `--run-dir=~/run`.

    Raises ConfigError where there is no home directory, and for a URL, also one that lost a slash: `pathlib` makes
    s3:/bucket of s3://bucket.
    """
    text = str(path)
    if "://" in text and not isinstance(path, Path):
        raise ConfigError(f"{text}: this must be a path of this machine, not a URL")
    if match := _ONE_SLASH.fullmatch(text):
        raise ConfigError(
            f"{text}: write two slashes after the scheme, as in {match[1]}//{match[2]}, and pass URLs as text, not as "
            f"Path; for a directory of that name, write ./{text}"
        )
    if not text.startswith("~"):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{text}: ~ cannot be expanded, because there is no such home directory: set HOME, or write the full path"
        ) from error
