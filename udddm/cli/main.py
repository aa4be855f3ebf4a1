"""The command `udddm` and its subcommands, each in a module of that name."""

from __future__ import annotations

import difflib
import importlib
import sys

from udddm import __version__
from udddm.cli.command import USAGE

COMMANDS = {
    "train": "train a model, or resume a run (udddm-train)",
    "sample": "generate images with a trained model (udddm-sample)",
    "evaluate": "score a model, or samples, against a data set (udddm-evaluate)",
    "store": "inspect, copy, clean up, plan and benchmark x0-state stores (udddm-store)",
    "data": "inspect and resize data sets, and encode them as latents",
    "report": "write one HTML page about a run, or about several side by side",
    "export": "write a trained model as safetensors, ONNX, a diffusers pipeline, or a page for the browser",
    "config": "list and show presets, and explain every setting",
    "completion": "print the completion script of bash or zsh",
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
    lines = ["usage: udddm COMMAND ...", "", *(f"  {each:10} {text}" for each, text in COMMANDS.items())]
    if name in ("-h", "--help"):
        print("\n".join([*lines, "", "udddm COMMAND --help shows the arguments of a command"]))
        return 0
    print(f"error: {_meant(name, arguments)} (udddm --help shows all commands)", file=sys.stderr)
    return USAGE


def _meant(name: str, arguments: list[str]) -> str:
    """What to write instead of an unknown command."""
    if name.startswith("-"):
        return f"{name}: start with a command, such as udddm train {' '.join(arguments)}"
    close = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    meant = f"did you mean udddm {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
    return f"udddm {name}: unknown command; {meant}"


if __name__ == "__main__":
    sys.exit(main())
