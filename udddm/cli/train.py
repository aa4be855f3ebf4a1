"""The command `udddm train`: trains or resumes a run."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from udddm.cli.arguments import Parser, is_override, not_an_override
from udddm.cli.command import add_version, reported

if TYPE_CHECKING:
    from udddm.config import RunConfig


def _workers(text: str) -> tuple[int, int]:
    """Argument type: a number of workers, `4`, or a range, `2:8`."""
    low, separator, high = text.partition(":")
    try:
        least, most = int(low), int(high) if separator else int(low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of workers, or MIN:MAX") from None
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: give at least 1 worker, and MIN <= MAX")
    return least, most


def _parser() -> Parser:
    parser = Parser(
        prog="udddm train",
        description="Train a one-step image generator. Repeating the command resumes the run.",
        epilog="udddm train --config digits train.steps=500 lr=3e-4 objective=ict",
    )
    parser.overrides = True
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="DATA|KEY=VALUE",
        help="settings that replace those of the preset, such as steps=500; or the data set to train on: a folder of "
        "images, a .zip, .tar shards, a Hugging Face data set, an .npy, .npz or Zarr array (docs/data.md)",
    )
    parser.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="train on this data set, with settings chosen for it: the same as its path without --data, or a name such "
        "as cifar10",
    )
    parser.add_argument("--print-config", action="store_true", help="print the configuration as YAML, and exit")
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="a preset (udddm config list), a YAML file, or the config.yaml of a run, which is then resumed",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR|URL",
        help="directory or URL of the run (default: runs/<preset>, or the run of its config.yaml)",
    )
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=20,
        metavar="STEPS",
        help="trace this many steps (default 20) into <run>/profile, with a table of where the time goes "
        "(profile_steps)",
    )
    parser.add_argument(
        "--continue",
        dest="going_on",
        metavar="RUN",
        help="make a finished run longer: udddm train --continue runs/digits train.steps=2x",
    )
    parser.add_argument(
        "--new", action="store_true", help="start a new run in the run directory's name with a number, such as -001"
    )
    _add_training(parser)
    _add_workers(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what the run needs and its time, and exit")
    parser.add_argument("--gpus", metavar="8xH100", help="with --dry-run: for these GPUs (default: those here)")
    add_version(parser)
    return parser


def _add_training(parser: Parser) -> None:
    parser.add_argument(
        "--store",
        metavar="KIND",
        help="x0-state store: none, gpu, pinned, zarr, or package.module:factory (store.kind)",
    )
    parser.add_argument(
        "--store-url", metavar="URL", help="location of the zarr store (store.url; default <run>/state)"
    )
    parser.add_argument(
        "--on-corruption",
        "--on-damage",
        choices=["stop", "reinitialize"],
        help="action on a corrupt chunk of the state (store.on_corruption; --on-damage is the old name)",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="the same as KEY=VALUE without --set"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="training engine: torch, deepspeed, or package.module:factory (engine.name)",
    )
    parser.add_argument("--zero", type=int, choices=range(4), help="DeepSpeed's ZeRO stage (engine.zero)")
    parser.add_argument("--deepspeed", metavar="FILE", help='a DeepSpeed JSON file; "auto" values are filled in')


def _add_workers(parser: Parser) -> None:
    cluster = parser.add_argument_group("workers")
    cluster.add_argument(
        "--backend",
        metavar="NAME",
        default="auto",
        help="launcher of the workers: auto (Ray inside a Ray job), local, ray, or package.module:factory",
    )
    cluster.add_argument(
        "--workers", type=_workers, default=(1, 1), metavar="N|MIN:MAX", help="processes, one per GPU (default 1)"
    )
    cluster.add_argument(
        "--max-failures", type=int, default=0, metavar="N", help="restarts after a lost or hung worker (default 0)"
    )
    cluster.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="limit of one collective operation (default 600)"
    )


def _data(parser: Parser, arguments: argparse.Namespace) -> str | None:
    """The data set that the command names, or None. It is taken from the arguments."""
    named = [text for text in arguments.overrides if not is_override(text) and _is_place(text)]
    found: list[str] = [*named, *([arguments.data] if arguments.data else [])]
    if len(found) > 1:
        parser.error(f"two data sets: {found[0]} and {found[1]}; give one")
    if found and arguments.config:
        parser.error(f"--config {arguments.config} and the data set {found[0]}: give one, or set data.path={found[0]}")
    arguments.overrides = [text for text in arguments.overrides if text not in named]
    return found[0] if found else None


def _is_place(text: str) -> bool:
    from udddm.config.presets import SUFFIXES

    known = "://" in text or Path(text).suffix == ".tar" or Path(text).expanduser().exists()  # x-{000..127}.tar
    return Path(text).suffix not in SUFFIXES and known


def _chosen(data: str, run: str, changes: list[str], device: str) -> RunConfig:
    """The configuration for a data set: that of the run, if it was begun, or one that is chosen now, and logged."""
    from udddm import config as configuration
    from udddm.config.reading import keys_set, overridden, resolve
    from udddm.errors import ConfigError
    from udddm.log import install, log
    from udddm.storage import local_path
    from udddm.tools import automatic

    install()
    directory = local_path(run)
    begun = directory / "config.yaml" if directory is not None else None
    changes = [_absolute(each) for each in changes]
    section = automatic.data_section(data)
    if begun is not None and begun.exists():
        config = configuration.load_config(begun, changes)
        if config.data.path != section.get("path"):
            raise ConfigError(f"{run} was begun on {config.data.path or config.data.name}: give another --run-dir")
        return config
    of_data = [each for each in changes if all(key.startswith("data.") for key in keys_set(each))]
    section = overridden({"data": section}, of_data, "the configuration")["data"]  # the choice depends on them
    config, lines = automatic.choose(section, automatic.machine(device))
    for line in lines:
        log.info(line)
    log.info(f"These settings were chosen for the data; {run}/config.yaml has them, to be edited for another run")
    return resolve(overridden(config.model_dump(mode="json"), changes, "the configuration"), "the configuration")


def _absolute(change: str) -> str:
    """`data.condition.path=PLACE` with the complete path, as that of the images is recorded."""
    from udddm.storage import local_path

    key, _, place = change.partition("=")
    local = local_path(place) if key.strip() == "data.condition.path" and place else None
    return change if local is None else f"{key}={local.resolve()}"


def _write_report(run: str | Path, device: str) -> None:
    """Write `report.html` of a finished run in a local directory, unless there is one already. Failing is a warning."""
    from udddm.log import log
    from udddm.storage import local_path
    from udddm.tools import report

    directory = local_path(run)
    if directory is None or (directory / "report.html").exists():
        return
    try:
        report.write([directory], directory / "report.html", device=device)
    except Exception as error:  # the run is complete: whatever is wrong, a page about it is not worth an exit code
        log.warning(f"no report of the run was written: {type(error).__name__}: {error}")
    else:
        log.info(f"report: {directory / 'report.html'}")


def _configured(arguments: argparse.Namespace, data: str | None, overrides: list[str]) -> tuple[RunConfig, str | Path]:
    """The configuration and the directory or URL of the run. Raises ConfigError."""
    from udddm import config as configuration
    from udddm.runs import growing

    changes = [*overrides, *_flags(arguments)]
    if arguments.going_on:
        return growing.planned(arguments.going_on, changes), arguments.going_on
    if data is not None:
        run = arguments.run_dir or f"runs/{Path(data.rstrip('/')).stem}"
        return _chosen(data, run, changes, arguments.device), run
    return configuration.load_config(arguments.config, changes), arguments.run_dir or _default_run(arguments.config)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse(argv)
    if arguments.gpus and not arguments.dry_run:
        parser.error("--gpus is for --dry-run: a run uses the GPUs that are here (--workers N)")
    data = _data(parser, arguments)
    for option, given in (("--new", arguments.new), ("--continue", arguments.going_on)):
        if given and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            parser.error(f"{option} is for one process, and WORLD_SIZE is above 1: start it with --workers instead")
    if arguments.going_on and (given := data or arguments.config or arguments.run_dir or arguments.new):
        parser.error(f"--continue {arguments.going_on} has its own configuration, data and directory: drop {given}")
    for text in arguments.overrides:
        if not is_override(text):
            parser.error(not_an_override(text, arguments.overrides))
    overrides = [*arguments.set, *arguments.overrides]

    def body() -> int:
        from udddm import config as configuration

        config, run = _configured(arguments, data, overrides)
        if arguments.print_config:
            print(configuration.as_yaml(config.model_dump(mode="json"), flow=False), end="")
            return 0
        if arguments.dry_run:
            from udddm.tools import gpus
            from udddm.tools.dry_run import plan

            on = gpus.parse(arguments.gpus) if arguments.gpus else None
            for line in plan(config, arguments.device, on=on):
                print(line)
            return 0
        from udddm.api import train as run_training
        from udddm.runs.summary import last_line

        if arguments.new:
            from udddm.runs.growing import numbered

            run = numbered(run)
        began = time.monotonic()
        result = run_training(
            config,
            run_dir=run,
            device=arguments.device,
            backend=arguments.backend,
            workers=arguments.workers,
            max_failures=arguments.max_failures,
            timeout=arguments.timeout,
            extend=bool(arguments.going_on),
        )
        if os.environ.get("RANK", "0") == "0":  # one of the ranks of torchrun prints it
            if config.sample.final:
                _write_report(run, arguments.device)
            print(last_line(config, run, result, time.monotonic() - began, _command()))
        return 0

    return reported(body, clean_up=False)  # the run decides when to stop


def _command() -> str:
    """How the command `udddm` is typed: with the path of this one, unless the shell finds it."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return "python -m udddm"
    found = shutil.which("udddm")
    here = program.with_name("udddm")
    return str(here) if here.exists() and (found is None or not here.samefile(found)) else "udddm"


def _flags(arguments: argparse.Namespace) -> list[str]:
    """The overrides that the options stand for. Raises ConfigError for a DeepSpeed file that cannot be read."""
    engine = arguments.engine or ("deepspeed" if arguments.deepspeed else None)
    given = {
        "store.kind": arguments.store,
        "store.url": arguments.store_url,
        "store.on_corruption": arguments.on_corruption,
        "profile_steps": arguments.profile,
        "engine.name": engine,
        "engine.zero": arguments.zero,
    }
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    if arguments.deepspeed:
        import json

        from udddm.backends.engines.deepspeed_config import read

        overrides.append(f"engine.deepspeed={json.dumps(read(arguments.deepspeed))}")
    return overrides


def _default_run(config: str | None) -> Path:
    """Where a run without --run-dir is: the run whose config.yaml this is, or runs/<name of the preset>."""
    from udddm.config import presets

    if config is None:
        return Path("runs") / "default"
    file = presets.find(config)
    if file.name == "config.yaml" and (file.parent / "run.json").exists():
        return file.parent
    return Path("runs") / file.stem


if __name__ == "__main__":
    sys.exit(main())
