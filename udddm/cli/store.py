"""The command `udddm store`: x0-state stores, inspected, copied, cleaned up, planned and benchmarked."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from udddm.cli.arguments import Parser, check_exists
from udddm.cli.command import FAILED, TRUST, add_version, path, positive, reported


def _shape(text: str) -> tuple[int, ...]:
    try:
        sides = tuple(int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write the shape as 3x32x32") from None
    if len(sides) != 3 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write the shape as CHANNELSxHEIGHTxWIDTH, such as 3x32x32")
    return sides


def _parser() -> Parser:
    parser = Parser(prog="udddm store", description="Inspect, copy, clean up, plan and benchmark x0-state stores.")
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    dtypes = ["fp32", "fp16", "bf16", "uint8"]
    for name, text in (
        ("info", "show the contents of a store; read-only, safe during a run"),
        ("verify", "check every chunk's checksum; exit with code 1 and a list if any is corrupt; safe during a run"),
        ("view", "write a PNG of one sample: its image, and its x0-state in every kept generation"),
        ("convert", "copy the newest state to another path or URL, optionally in another dtype"),
        ("gc", "delete the generations of a stopped run that no checkpoint refers to"),
        ("plan", "estimate what a data set's state needs: bytes, memory, bandwidth, requests, and which store fits"),
        ("bench", "measure the speed of a URL from this machine, and compare it with the requirements of the plan"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if name != "plan":
            command.add_argument("path", metavar="RUN|URL", help="a run directory, or the path or URL of a store")
        if name == "view":
            command.add_argument("--sample", type=int, required=True, metavar="I", help="index of the sample")
            command.add_argument("--out", type=path, default=Path("view.png"), metavar="FILE", help="default view.png")
            command.add_argument("--trust", action="store_true", help=TRUST)
        if name == "convert":
            command.add_argument("destination", metavar="URL")
            command.add_argument("--dtype", choices=dtypes)
        if name in ("plan", "bench"):
            command.add_argument("--samples", type=positive, required=name == "plan", default=50_000, metavar="N")
            command.add_argument("--shape", type=_shape, default=(3, 32, 32), metavar="3x32x32")
            command.add_argument("--dtype", choices=dtypes, default="fp16")
            command.add_argument("--images-per-second", type=positive, default=5000, metavar="R")
            command.add_argument("--workers", type=positive, default=1)
            command.add_argument("--batch", type=positive, default=1024, help="samples per step, over all workers")
        if name == "bench":
            command.add_argument("--threads", type=positive, default=8)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse(argv)

    if arguments.command not in ("plan", "bench"):
        check_exists(parser, arguments.path)

    def body() -> int:
        if arguments.command in ("plan", "bench"):
            return _plan_store(arguments)
        from udddm.tools import convert, inspect

        if arguments.command == "gc":
            removed = convert.collect(arguments.path, print)
            print(f"removed {', '.join(map(str, removed)) or 'nothing'}" + (" (generations)" if removed else ""))
            return 0
        place = inspect.find(arguments.path)
        if arguments.command == "info":
            print("\n".join(inspect.info(place)))
        elif arguments.command == "verify":
            chunks, damaged = inspect.verify(place)
            print(
                "\n".join(damaged) if damaged else f"{chunks} chunks and {len(place.checkpoints)} checkpoints are valid"
            )
            return FAILED if damaged else 0
        elif arguments.command == "convert":
            print(convert.convert(place, arguments.destination, arguments.dtype))
        else:
            _view(place, arguments.sample, arguments.out, arguments.trust)
        return 0

    return reported(body)


def _plan_store(arguments: argparse.Namespace) -> int:
    from udddm.storage import open_object_store
    from udddm.tools import capacity

    needed = capacity.needs(
        arguments.samples,
        arguments.shape,
        arguments.dtype,
        arguments.images_per_second,
        arguments.workers,
        arguments.batch,
    )
    print("\n".join(capacity.plan(needed)))
    if arguments.command == "bench":
        speed = capacity.measure(open_object_store(arguments.path), needed.chunk_bytes, threads=arguments.threads)
        print("\n".join(capacity.verdict(needed, speed)))
    return 0


def _view(place: object, sample: int, out: Path, trust: bool) -> None:
    import numpy as np
    import torch

    from udddm.config.trust import DATA, reaching
    from udddm.data import ImageDataset, check_unchanged, load_dataset
    from udddm.errors import ConfigError, DataError
    from udddm.image_grid import save_image_grid
    from udddm.runs.pretrained import recorded_data
    from udddm.tools import inspect
    from udddm.urls import redact

    assert isinstance(place, inspect.Place)
    found = inspect.estimates(place, sample)
    names, images = [name for name, _ in found], [image for _, image in found]
    unasked = reaching(place.config, DATA) if place.config is not None and not trust else []
    if unasked:
        named = redact(", ".join(unasked))
        print(
            f"the image is omitted: the configuration of {place.name} names its data set by {named}, which is "
            "imported or opened only with --trust",
            file=sys.stderr,
        )
    elif place.config is not None:
        try:
            dataset = ImageDataset(load_dataset(place.config.data))
            if (recorded := recorded_data(place.name)) is not None:
                check_unchanged(recorded, dataset.fingerprint())
            image, _ = dataset.batch(np.array([sample]))
        except (ConfigError, DataError) as error:  # for example a data set that was passed from Python
            print(f"the image is omitted: {error}", file=sys.stderr)
        else:
            names.insert(0, "the image")
            images.insert(0, image[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_image_grid(torch.stack(images), out, columns=len(images), side=128)
    print(f"sample {sample} in {out}, left to right: {', '.join(names)}")


if __name__ == "__main__":
    sys.exit(main())
