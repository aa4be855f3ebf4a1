"""The command `udddm`, with the subcommands `train`, `sample`, `evaluate` and `store`."""

from __future__ import annotations

import importlib
import sys

from udddm import __version__
from udddm.cli.command import USAGE

COMMANDS = {
    "train": "train a model, or resume a run (udddm-train)",
    "sample": "generate images with a trained model (udddm-sample)",
    "evaluate": "score a model, or samples, against a data set (udddm-evaluate)",
    "store": "inspect, copy, clean up, plan and benchmark x0-state stores (udddm-store)",
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(__version__)
        return 0
    if name in COMMANDS:
        found: int = importlib.import_module(f"udddm.cli.{name}").main(arguments[1:])
        return found
    lines = ["usage: udddm COMMAND ...", "", *(f"  {each:9} {text}" for each, text in COMMANDS.items())]
    if name in ("-h", "--help"):
        print("\n".join([*lines, "", "udddm COMMAND --help shows the arguments of a command"]))
        return 0
    print("\n".join([f"error: udddm {name}: unknown command", *lines]), file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
