"""The parser of all commands: positional arguments anywhere, and one line for a mistake, with what is meant."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from udddm.cli.command import USAGE

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*\s*=")
_ONE_VALUE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that says what to write."""

    overrides = False
    """Whether the command takes KEY=VALUE."""

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse arguments, with positional ones before, between or after options."""
        given = list(sys.argv[1:] if argv is None else argv)
        commands = next((each for each in self._actions if isinstance(each, argparse._SubParsersAction)), None)
        if commands is None:
            found, unknown = self.parse_known_intermixed_args(given)
            parser = self
        else:
            found, unknown = self.parse_known_args(given)
            parser = commands.choices[found.command]
            if hasattr(found, "overrides"):  # argparse takes no further positional ones after an option
                found.overrides += [text for text in unknown if is_override(text)]
                unknown = [text for text in unknown if not is_override(text)]
        if unknown:
            parser.error(_unknown(parser, unknown[0], given))
        return found

    def error(self, message: str) -> NoReturn:
        if match := _ONE_VALUE.match(message):
            message = f"{match[1]} needs a value: {self._example(match[1])}"
        elif match := re.match(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            options = [each.strip("' ") for each in match[3].split(",")]
            message = f"{match[1]}: {match[2]!r} is unknown; {_choose(match[2], options)}"
        elif message == "the following arguments are required: command":
            commands = next(each for each in self._actions if isinstance(each, argparse._SubParsersAction))
            message = f"give a command: {', '.join(commands.choices)}"
        elif match := re.match(r"argument (\S+): invalid (\w+) value: (.*)", message):
            kind = {"int": "a whole number", "positive": "a whole number"}.get(match[2], "a number")
            message = f"{match[1]} {match[3]}: give {kind}, such as {self._example(match[1])}"
        self.exit(USAGE, f"error: {message.removeprefix('argument ')} ({self.prog} --help shows all arguments)\n")

    def _example(self, names: str) -> str:
        name = names.split("/")[0]
        action = self._option_string_actions.get(name)
        if action is None:
            return name
        value = action.metavar if isinstance(action.metavar, str) else "|".join(map(str, action.choices or ["VALUE"]))
        if action.type in (int, float) or getattr(action.type, "__name__", "") == "positive":
            value = str(action.default if action.default is not None else 1)
        return f"{name} {value}"


def _choose(given: str, options: Sequence[str]) -> str:
    if given == "gpu" and "cuda" in options:
        given = "cuda"
    close = difflib.get_close_matches(given, options, 1, 0.5)
    return (f"did you mean {close[0]}? The choices are " if close else "the choices are ") + ", ".join(options)


def _unknown(parser: Parser, name: str, given: Sequence[str]) -> str:
    """What to write instead of an unknown argument."""
    if not name.startswith("-"):
        return f"unexpected argument {name!r}"
    option, _, value = name.partition("=")
    following = given[given.index(name) + 1 :] if name in given else []
    if not value and following and not following[0].startswith("-"):
        value = following[0]
    key = option.lstrip("-").replace("-", "_")
    options = [each for each in parser._option_string_actions if each.startswith("--")]
    setting = _setting(key) if parser.overrides else ""
    close = difflib.get_close_matches(option, options, 1, 0.7)
    if setting and not (close and setting.rpartition(".")[2] != key):
        return f"there is no {option}; write {setting}={value or '...'}"
    if close:
        return f"there is no {option}; did you mean {close[0]}?"
    return f"there is no {option}"


def _setting(name: str) -> str:
    """The dotted key of a setting that was written as an option, or ""."""
    from udddm.config.mistakes import keys_of
    from udddm.config.run import RunConfig
    from udddm.config.shorthand import ALIASES

    if name in ALIASES:
        return ALIASES[name]
    keys = keys_of(RunConfig)
    if "." in name:
        close = difflib.get_close_matches(name, keys, 1, 0.8)
        return close[0] if close else ""
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)} | ALIASES
    close = difflib.get_close_matches(name, by_leaf, 1, 0.8)
    return by_leaf[close[0]] if close else ""


def is_override(text: str) -> bool:
    """Whether a positional argument is KEY=VALUE, not a path."""
    return _OVERRIDE.match(text) is not None


def add_run(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the positional RUN, with the option `--checkpoint` of earlier versions."""
    parser.add_argument("run", nargs="?", metavar="RUN", help=text)
    parser.add_argument("--checkpoint", metavar="RUN", help="the same as RUN")


def run_of(parser: Parser, arguments: argparse.Namespace) -> Any:
    """The run that a command was given, or None. Ends the command if it was given twice."""
    if arguments.run and arguments.checkpoint and arguments.run != arguments.checkpoint:
        parser.error(f"two runs: {arguments.run} and --checkpoint {arguments.checkpoint}; give one")
    run = arguments.run or arguments.checkpoint
    if run is not None:
        check_exists(parser, run)
    return run


def name_of(run: str) -> str:
    """The last part of the path of a run or checkpoint that names it."""
    *_, name = [part for part in run.rstrip("/").split("/") if part not in ("", ".", "..", "checkpoints")] or ["run"]
    return name


def check_exists(parser: Parser, run: str) -> None:
    """End the command if a run is neither a URL nor an existing path."""
    from udddm.config.presets import names

    if "://" in run or Path(run).expanduser().exists():
        return
    here = sorted(str(path.parent) for path in Path("runs").glob("*/run.json"))
    close = difflib.get_close_matches(run, [*here, *(Path(each).name for each in here)], 1, 0.6)
    if close:
        meant = next(each for each in here if close[0] in (each, Path(each).name))
        parser.error(f"{run} does not exist; did you mean {meant}?")
    if run in names():
        parser.error(f"{run} is a preset, not a run: train it first, with udddm train --config {run}")
    parser.error(f"{run} does not exist" + (f"; the runs here are {', '.join(here[:9])}" if here else ""))


def not_an_override(text: str, others: Sequence[str] = ()) -> str:
    """What to write instead of an argument of `train` that is not KEY=VALUE."""
    from udddm.config.mistakes import keys_of
    from udddm.config.presets import SUFFIXES, names
    from udddm.config.run import RunConfig
    from udddm.config.shorthand import ALIASES

    if quoted := next((each for each in others if is_override(each) and re.search(r"=.*[{\[]", each)), None):
        return f"{text}: put the setting in quotes, as in '{quoted} {text}'"
    if text in names() or Path(text).suffix in SUFFIXES:
        return f"{text}: write --config {text}"
    if text in ALIASES or text in keys_of(RunConfig):
        value = next((each for each in others if not is_override(each) and each != text), "...")
        return f"{text}: write {text}={value}"
    close = difflib.get_close_matches(text, names(), 1, 0.6)
    meant = f"did you mean --config {close[0]}? Settings are written" if close else "write settings"
    return f"{text}: {meant} as KEY=VALUE, such as train.steps=500"
