"""The command `udddm export`: a trained model in the formats of other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from udddm.cli.arguments import Parser, add_run, name_of, run_of
from udddm.cli.command import TRUST, add_average, add_version, path, reported

FORMATS = {
    "safetensors": "a release: weights of one average, configuration, samples and a model card",
    "onnx": "the one-evaluation generator as an ONNX file, compared with PyTorch",
    "diffusers": "a pipeline for DiffusionPipeline.from_pretrained",
    "hub": "a release for the Hugging Face Hub, uploaded with --repo",
    "web": "a page that runs the ONNX file in a browser",
}


def _parser() -> Parser:
    parser = Parser(
        prog="udddm export",
        description="Write a trained model to a new folder: " + "; ".join(f"{k}: {v}" for k, v in FORMATS.items()),
        epilog="udddm export runs/digits --to onnx --out exports/digits",
    )
    add_run(parser, "a run, a checkpoint or a release: a directory, a URL, or hf://user/model")
    parser.add_argument("--to", choices=list(FORMATS), help="the format")
    parser.add_argument(
        "--out", type=path, metavar="DIR", help="a new or empty folder (default: exports/<run>-<format>)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "fp16"], help="of the ONNX file's weights and operations (default fp32)"
    )
    parser.add_argument("--repo", metavar="USER/NAME", help="also upload the folder to the Hugging Face Hub")
    parser.add_argument(
        "--runtime",
        type=path,
        metavar="DIR",
        help="copy onnxruntime-web into the page's folder from this folder of its npm package (default: a public CDN)",
    )
    parser.add_argument(
        "--no-data",
        action="store_true",
        help="of a model conditioned on images: show no examples of its data set in the card, the samples, the page",
    )
    add_average(parser)
    parser.add_argument("--trust", action="store_true", help=TRUST)
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse(argv)
    run = run_of(parser, arguments)
    _check(parser, arguments, run)

    def body() -> int:
        from udddm.tools import export
        from udddm.tools.export import upload

        if arguments.repo is not None:
            upload.check(arguments.repo)
        out: Path = arguments.out or Path("exports") / f"{name_of(run)}-{arguments.to}"
        options = export.Options(
            ema=arguments.ema,
            ema_length=arguments.ema_length,
            precision=arguments.precision or "fp32",
            runtime=arguments.runtime,
            trust=arguments.trust,
            data=not arguments.no_data,
        )
        lines = export.write(run, out, arguments.to, options)
        print("\n".join([f"{out}: {_size(out) / 1e6:.1f} MB", *(f"  {line}" for line in lines)]))
        if arguments.repo is not None:
            print(f"uploaded: udddm.load_model({upload.upload(out, arguments.repo)!r})")
        return 0

    return reported(body)


def _check(parser: Parser, arguments: argparse.Namespace, run: Any) -> None:
    """End the command if an argument is missing or would have no effect."""
    if run is None:
        parser.error("give a run, a checkpoint or a release, such as udddm export runs/digits --to onnx")
    if arguments.to is None:
        parser.error(f"give a format: --to {', '.join(FORMATS)}")
    uses = {
        "precision": ("onnx", "web"),
        "runtime": ("web",),
        "repo": ("hub", "safetensors", "diffusers"),
        "no_data": ("safetensors", "hub", "diffusers", "web"),
    }
    for option, formats in uses.items():
        if getattr(arguments, option) not in (None, False) and arguments.to not in formats:
            name = option.replace("_", "-")
            parser.error(f"--{name} has no effect with --to {arguments.to}; it is for --to {', '.join(formats)}")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
