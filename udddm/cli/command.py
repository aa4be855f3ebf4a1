"""Shared by all commands: exit codes, error messages, common options and argument types."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from udddm import __version__
from udddm.errors import ConfigError, Interrupted, UdddmError
from udddm.files import expanded

FAILED = 1
USAGE = 2
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
"""Disk and permission errors, which the user can fix."""
_PATH = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
"""Errors of a path that the user gave, such as a file instead of a directory."""
TRUST = (
    "allow the configuration stored in the checkpoint to import code and open files, such as its network or data set; "
    "only for files that you trust"
)
"""Help for `--trust` (udddm/config/trust.py)."""


MOST = 10_000_000
"""The maximum number of seeds in one command."""


def reported(body: Callable[[], int], *, clean_up: bool = True) -> int:
    """Run a command, and turn errors that are meant for the user into one message and an exit code.

    Exit codes: 0 for success, 1 for failure, 2 for an error in the arguments or the configuration, 128 + n if signal n
    stopped the command. Other exceptions keep their traceback. With `clean_up`, SIGTERM and SIGHUP raise
    KeyboardInterrupt, so that temporary files are removed.
    """
    from udddm import log
    from udddm.storage import threads

    log.install(force=True)
    try:
        code = _code_of(body, clean_up=clean_up)
    except Exception:
        if not threads.abandoned():
            raise
        traceback.print_exc()
        code = FAILED
    if threads.abandoned():
        _exit_now(code)
    return code


def _code_of(body: Callable[[], int], *, clean_up: bool) -> int:
    """The exit code of a command, after its errors are printed. Raises the exceptions that keep their traceback."""
    try:
        with _stopping() if clean_up else nullcontext():
            code = body()
        if sys.stdout is not None:
            sys.stdout.flush()
    except ConfigError as error:
        code = _say(f"error: {error}", USAGE)
    except Interrupted as error:
        code = _say(str(error), error.exit_code)
    except UdddmError as error:
        code = _say("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), FAILED)
    except BrokenPipeError:  # the reader of the output ended, as `head` does
        with suppress(OSError, ValueError):  # what is left to write at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in _PATH and error.filename:
            return _say(f"error: {error.strerror}{where}; give another path", USAGE)
        if error.errno not in _DISK:
            raise
        advice = "Free disk space or restore access, then run the same command again"
        code = _say(f"error: {error.strerror}{where}. Checkpoints and earlier files are intact. {advice}", FAILED)
    except KeyboardInterrupt as error:
        signum = error.args[0] if error.args else signal.SIGINT
        resumes = (
            ""
            if clean_up
            else "; the same command resumes from the newest checkpoint, or starts again if there is none"
        )
        code = _say(f"stopped immediately{resumes}", 128 + signum)
    return code


def _say(text: str, code: int) -> int:
    """Print an error. Returns `code` even if nothing reads the message."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
    return code


@contextmanager
def _stopping() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(signum)

    previous: dict[int, Any] = {}
    with suppress(ValueError):  # not in the main thread
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) == signal.SIG_DFL:
                previous[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _exit_now(code: int) -> None:
    """End the process without waiting for threads, of which one waits for a data set, a feature network or a rank that
    does not return."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


def path(text: str) -> Path:
    """A local file or directory, with ~ expanded."""
    try:
        return expanded(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=__version__)


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a sampler and its number of network evaluations."""
    parser.add_argument(
        "--steps", "--nfe", type=positive, default=1, metavar="N", help="network evaluations per image (default 1)"
    )
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
        help="settings of a custom sampler: '{key: value}'",
    )


def add_guidance_and_average(parser: argparse.ArgumentParser, length: Callable[[str], Any] = float) -> None:
    """Add the options for guidance and for the average of the weights. `length` is the type of its length."""
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance weight (default 1: none)"
    )
    add_average(parser, length)


def add_average(parser: argparse.ArgumentParser, length: Callable[[str], Any] = float) -> None:
    """Add the options for the average of the weights. `length` is the type of its length."""
    average = parser.add_mutually_exclusive_group()
    average.add_argument(
        "--ema",
        metavar="NAME",
        help="average of the weights: a decay, power-LENGTH, or 'none' for the weights themselves (default: the first)",
    )
    average.add_argument(
        "--ema-length",
        type=length,
        metavar="S",
        help="build the average of this relative length from the snapshots of train.power_ema"
        + ("" if length is float else "; FROM:TO or FROM:TO:COUNT scores a range of them"),
    )


def mapping(text: str) -> dict[str, Any]:
    """Argument type: a YAML mapping such as `{levels: [5, 1]}`."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: write a mapping such as '{{levels: [5, 1]}}'")
    return found


def positive(text: str) -> int:
    """Argument type: an integer that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def integers(text: str) -> list[int]:
    """Argument type: integers and ranges, such as `0-999`, `7` or `1,5,9-12`."""
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
            raise argparse.ArgumentTypeError(f"{text!r}: more than {MOST} numbers; use several commands")
        found += range(low, high + 1)
    return found
