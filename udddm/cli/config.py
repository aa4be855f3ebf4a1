"""The command `udddm config`: presets, and what every setting means."""

from __future__ import annotations

import argparse
import sys

from udddm.cli.arguments import Parser
from udddm.cli.command import add_version, reported


def _parser() -> Parser:
    parser = Parser(prog="udddm config", description="Show presets and settings.")
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "list the presets that --config takes by name"),
        ("show", "print a preset; with KEY=VALUE or --all, the complete configuration that results"),
        ("reference", "print every setting with its type, default and meaning, as Markdown"),
        ("schema", "print the JSON schema of a configuration, for editors"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if name == "show":
            command.add_argument("name", metavar="NAME|FILE", help="a preset, a YAML file or a run directory")
            command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as train.steps=500")
            command.add_argument("--all", action="store_true", help="print every setting, with its default")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse(argv)
    return reported(lambda: _COMMANDS[arguments.command](arguments))


def _list(arguments: argparse.Namespace) -> int:
    from udddm.config import presets

    names = presets.names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {presets.summary(name)}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from udddm.config import as_yaml, load_config, presets

    config = load_config(arguments.name, arguments.overrides)  # also of a file that is printed as it is: it is valid
    if arguments.all or arguments.overrides:
        print(as_yaml(config.model_dump(mode="json"), flow=False), end="")
    else:
        print(presets.text_of(arguments.name), end="")
    return 0


def _reference(arguments: argparse.Namespace) -> int:
    from udddm.config.reference import markdown

    print(markdown(), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from udddm.config.reference import schema

    print(schema())
    return 0


_COMMANDS = {"list": _list, "show": _show, "reference": _reference, "schema": _schema}


if __name__ == "__main__":
    sys.exit(main())
