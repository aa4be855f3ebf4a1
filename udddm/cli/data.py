"""The command `udddm data`: data sets, inspected, resized, and encoded as latents."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from udddm.cli.arguments import Parser
from udddm.cli.command import FAILED, add_version, path, positive, reported

FILTERS = ("adm", "edm", "lanczos")
FORMATS = ("zip", "folder", "zarr")


def _parser() -> Parser:
    parser = Parser(prog="udddm data", description="Inspect, resize and encode data sets (docs/data.md).")
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = _command(
        commands,
        "inspect",
        "read all images: number, shapes, classes, duplicates, damaged files, values; exit code 1 if any is damaged",
    )
    inspect.add_argument(
        "--condition",
        nargs="?",
        const="",
        metavar="PLACE",
        help="count pairs: where the conditioning images are (data.condition.path or data.condition.image)",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON, with the names of all duplicates")
    resize = _command(commands, "resize", "write images of one size to a ZIP archive, folder or Zarr group; resumable")
    _add_target(resize)
    resize.add_argument("--size", required=True, metavar="N|HxW", help="size in pixels")
    resize.add_argument(
        "--filter",
        choices=FILTERS,
        default="adm",
        help="adm (default): box halvings, bicubic, central crop; edm: central crop, Lanczos; lanczos: no crop",
    )
    encode = _command(commands, "encode", "write the latents of an autoencoder to a Zarr group to train on; resumable")
    encode.add_argument("target", type=path, metavar="TARGET.zarr")
    encode.add_argument("--size", type=positive, metavar="N", help="crop and resize image files (data.size)")
    encode.add_argument(
        "--measured", type=positive, default=10_000, metavar="N", help="images whose latents are measured (10000)"
    )
    decode = commands.add_parser("decode", help="write the images of latents", description="Write images of latents.")
    decode.add_argument("data", metavar="LATENTS", help="a Zarr group of udddm data encode, or samples.npy of a model")
    decode.add_argument(
        "--moments",
        default="",
        metavar="GROUP",
        help="the Zarr group of udddm data encode that samples were trained on",
    )
    _add_target(decode)
    for command in (encode, decode):
        command.add_argument(
            "--autoencoder",
            type=path,
            required=True,
            metavar="FILE|FOLDER",
            help="a TorchScript file (a program: name only one that you trust) or a folder of diffusers' AutoencoderKL",
        )
        command.add_argument("--batch", type=positive, default=64, metavar="N", help="images per batch (64)")
        command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


def _command(commands: argparse._SubParsersAction[Parser], name: str, text: str) -> Parser:
    command: Parser = commands.add_parser(name, help=text, description=text)
    command.add_argument(
        "data", metavar="DATA", help="a path or URL of any kind of data set, or a name such as cifar10"
    )
    command.add_argument("--image", metavar="NAME", help="data.image: extension (WebDataset) or column of the images")
    command.add_argument("--label", metavar="NAME", help="data.label: extension, json.KEY or column of the labels")
    command.add_argument("--split", metavar="NAME", help="data.split: split of a Hugging Face data set")
    return command


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=path, metavar="TARGET", help="a name in .zip, .zarr, or a folder")
    parser.add_argument("--format", choices=FORMATS, help="format of the target (default: by its name)")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse(argv)

    def body() -> int:
        if arguments.command == "decode":
            return _decode(arguments)
        from udddm.tools.dataset.place import configuration

        given = {key: getattr(arguments, key) for key in ("image", "label", "split")}
        if arguments.command == "encode":
            given["size"] = arguments.size
        config = configuration(arguments.data, conditions=getattr(arguments, "condition", None), **given)
        if arguments.command == "inspect":
            from udddm.tools.dataset.examine import inspect

            found = inspect(config)
            print(json.dumps(found.as_json(), indent=1) if arguments.json else "\n".join(found.lines()))
            return FAILED if found.damaged else 0
        if arguments.command == "resize":
            from udddm.tools.dataset.filters import parse_size
            from udddm.tools.dataset.output import format_of
            from udddm.tools.dataset.resize import resize

            kind = arguments.format or format_of(arguments.target)
            print(resize(config, arguments.target, parse_size(arguments.size), arguments.filter, kind))
            return 0
        from udddm.tools.dataset.latents import encode

        target, device = arguments.target, _device(arguments.device)
        print("\n".join(encode(config, target, arguments.autoencoder, device, arguments.batch, arguments.measured)))
        return 0

    return reported(body)


def _decode(arguments: argparse.Namespace) -> int:
    from udddm.tools.dataset.latents import Decoding, decode
    from udddm.tools.dataset.output import format_of

    target: Path = arguments.target
    kind = arguments.format or format_of(target)
    device = _device(arguments.device)
    settings = Decoding(arguments.autoencoder, device, arguments.batch, kind, arguments.moments)
    print(decode(arguments.data, target, settings))
    return 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


if __name__ == "__main__":
    sys.exit(main())
