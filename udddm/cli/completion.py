"""The command `udddm completion`: scripts for bash and zsh, made from the parsers, the presets and the settings."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator

from udddm.cli.arguments import Parser
from udddm.cli.command import add_version, reported

_SCRIPT = """\
# Completion of udddm: eval "$(udddm completion {shell})" in ~/.{shell}rc
{start}_udddm() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[0]##*/}}
    local words="" inner="" i=1
    if [[ $command == udddm ]]; then command=${{COMP_WORDS[1]}} i=2; else command=${{command#udddm-}}; fi
    if (( COMP_CWORD < i )); then COMPREPLY=($(compgen -W "{commands}" -- "$cur")); return; fi
    if (( COMP_CWORD > i )); then inner=${{COMP_WORDS[i]}}; fi
    case "$command $prev" in
{values}
        *) case "$command $inner" in
{subcommands}
            *) case "$command" in
{options}
            esac ;;
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
    [[ $cur != -* && ${{#COMPREPLY[@]}} -eq 0 ]] && COMPREPLY=($(compgen -f -- "$cur"))
    return 0
}}
complete -o filenames -F _udddm {programs}
"""
_ZSH = "autoload -U +X compinit && compinit -u; autoload -U +X bashcompinit && bashcompinit\n"


def _parser() -> Parser:
    parser = Parser(prog="udddm completion", description="Print the completion script of a shell.")
    parser.add_argument("shell", choices=["bash", "zsh"], help='put eval "$(udddm completion bash)" in ~/.bashrc')
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse(argv)

    def body() -> int:
        print(script(arguments.shell), end="")
        return 0

    return reported(body)


def script(shell: str) -> str:
    """The completion script of a shell."""
    from udddm.cli.main import COMMANDS

    parsers: dict[str, Parser] = {name: importlib.import_module(f"udddm.cli.{name}")._parser() for name in COMMANDS}
    values, options, subcommands = [], [], []
    for name, parser in parsers.items():
        found = _subparsers(parser)
        words = [*_options(parser), *found, *_choices(parser)]
        options.append(f'                {name}) words="{" ".join(words)} {_keys(parser)}" ;;')
        subcommands += [
            f'            "{name} {inner}") words="{" ".join(_options(each))} {_presets(inner)}" ;;'
            for inner, each in found.items()
        ]
        for each in (parser, *found.values()):
            values += [f'        "{name} {option}") words="{words}" ;;' for option, words in _values(each)]
    return _SCRIPT.format(
        shell=shell,
        start=_ZSH if shell == "zsh" else "",
        commands=" ".join(COMMANDS),
        subcommands="\n".join(subcommands),
        values="\n".join(dict.fromkeys(values)),
        options="\n".join(options),
        programs="udddm udddm-train udddm-sample udddm-evaluate udddm-store",
    )


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for option in parser._option_string_actions if option.startswith("--")]


def _choices(parser: argparse.ArgumentParser) -> list[str]:
    """The names that a positional argument may have."""
    return [
        str(choice)
        for action in parser._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
        for choice in action.choices or ()
    ]


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _values(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """The options that take one of some names, and those names."""
    from udddm.config import plugins, presets

    members = {"--store": "STORES", "--engine": "ENGINES", "--backend": "LAUNCHERS", "--sampler": "SAMPLERS"}
    for option in _options(parser):
        action = parser._option_string_actions[option]
        if option == "--config":
            yield option, " ".join(presets.names())
        elif option in members:
            yield option, " ".join(getattr(plugins, members[option]).members)
        elif action.choices:
            yield option, " ".join(map(str, action.choices))
        elif action.nargs != 0 and action.metavar in ("DIR", "FILE", "RUN", "DIR|URL"):
            yield option, ""


def _presets(subcommand: str) -> str:
    from udddm.config import presets

    return " ".join(presets.names()) if subcommand == "show" else ""


def _keys(parser: Parser) -> str:
    """The settings, as KEY=, of a command that takes them."""
    from udddm.config import RunConfig
    from udddm.config.mistakes import keys_of
    from udddm.config.shorthand import ALIASES

    return " ".join(f"{key}=" for key in [*ALIASES, *keys_of(RunConfig)]) if parser.overrides else ""


if __name__ == "__main__":
    sys.exit(main())
