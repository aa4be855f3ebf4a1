"""What every command has in common: exit codes, errors as messages, and types of arguments."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from udddm import __version__, log
from udddm.errors import ConfigError, Interrupted, UdddmError
from udddm.files import expanded

FAILED = 1
USAGE = 2
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
"""Errors of a disk, which the user can resolve."""
TRUST = (
    "import and open what the checkpoint's own configuration names, such as its network or data set: for files that "
    "you trust"
)
"""Help for `--trust` (udddm/config/trust.py)."""


MOST = 10_000_000
"""Numbers in a list of seeds."""


def reported(body: Callable[[], int]) -> int:
    """Run a command: turn the errors that are meant for the user into one message and an exit code.

    0 is success, 1 failure, 2 a mistake in the arguments or configuration, 128 + n a stop by signal n after a
    checkpoint. Other exceptions keep their traceback.
    """
    log.install(force=True)
    try:
        return body()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except Interrupted as error:
        print(str(error), file=sys.stderr)
        return error.exit_code
    except UdddmError as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: {error.strerror}{where}. Checkpoints and earlier files are intact; make room or restore "
            "access, then run the same command again",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is intact and the same command resumes", file=sys.stderr)
        return 130


def path(text: str) -> Path:
    """A file or directory of this machine, with ~ replaced."""
    try:
        return expanded(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=__version__)


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """The options that choose a sampler."""
    parser.add_argument(
        "--sampler",
        default="renoise",
        metavar="NAME",
        help="renoise (default), algorithm-2, heun, or package.module:function",
    )
    parser.add_argument(
        "--sampler-settings",
        type=mapping,
        default={},
        metavar="YAML",
        help="of a sampler of your own: '{key: value}'",
    )


def mapping(text: str) -> dict[str, Any]:
    """A YAML mapping such as `{levels: [5, 1]}`."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: write a mapping such as '{{levels: [5, 1]}}'")
    return found


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def integers(text: str) -> list[int]:
    """`0-999`, `7`, `1,5,9` and mixtures."""
    found: list[int] = []
    for part in text.split(","):
        first, separator, last = part.partition("-")
        try:
            low = int(first)
            high = int(last) if separator else low
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write seeds as 0-999 or 1,5,9") from None
        if high < low:
            raise argparse.ArgumentTypeError(f"{part!r}: the last seed is below the first")
        if high >= 1 << 63:
            raise argparse.ArgumentTypeError(f"{part!r}: numbers must be below 2^63")
        if len(found) + high - low + 1 > MOST:
            raise argparse.ArgumentTypeError(f"{text!r}: that is more than {MOST} numbers; use several commands")
        found += range(low, high + 1)
    return found
