"""The command `udddm sample`: images from a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from udddm.cli.arguments import Parser, add_run, name_of, run_of
from udddm.cli.command import (
    MOST,
    TRUST,
    add_guidance_and_average,
    add_sampler,
    add_version,
    integers,
    path,
    positive,
    reported,
)
from udddm.cli.sample_tasks import Given, add_tasks, check_tasks

DEFAULT_COUNT = 64
DECODED_AT_ONCE = 16
"""Images per call of an autoencoder."""
KINDS = ("npy", "npz", "png", "grid")
"""What `--save` takes."""


def _parser() -> Parser:
    parser = Parser(
        prog="udddm sample",
        description="Generate images. Each depends only on its seed and label.",
        epilog="udddm sample runs/digits --count 100 --nfe 4",
    )
    add_run(parser, "a run directory or URL, or one of its checkpoints")
    add_sampler(parser)
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--count", type=positive, metavar="N", help=f"number of images (default {DEFAULT_COUNT})")
    seeds.add_argument("--seeds", type=integers, metavar="0-999", help="their seeds (default: 0 to N - 1)")
    parser.add_argument(
        "--labels",
        type=integers,
        metavar="0-9",
        help="class labels, cycled over the seeds (default: seed modulo number of classes)",
    )
    add_guidance_and_average(parser)
    add_tasks(parser)
    parser.set_defaults(steps=None)
    parser.add_argument("--out", type=path, metavar="DIR", help="directory of the files (default: samples/<run>)")
    parser.add_argument(
        "--save",
        type=_kinds,
        default=("npy", "grid"),
        metavar="KIND,...",
        help="what to write: npy (samples.npy, float32 in [-1, 1]), npz (samples.npz, uint8 arr_0 [N, H, W, C] and "
        "labels arr_1), png (<seed>.png each), grid (samples.png) (default npy,grid)",
    )
    parser.add_argument(
        "--autoencoder",
        type=path,
        metavar="PLACE",
        help="for a model of latents: decode them with this folder of diffusers' AutoencoderKL or TorchScript file, as "
        "udddm data decode; a TorchScript file is a program",
    )
    parser.add_argument(
        "--moments", metavar="GROUP", help="with --autoencoder: the Zarr group that udddm data encode wrote"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="images per call of the network, the last one padded, so that no bit of an image depends on the others "
        "(default: as many as there are, up to 250; images then agree to about 1e-6)",
    )
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_version(parser)
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    """Argument type: kinds of files, `npz,grid`."""
    wanted = tuple(text.split(","))
    for each in wanted:
        if each not in KINDS:
            raise argparse.ArgumentTypeError(f"{each!r}: the choices are {', '.join(KINDS)}, separated by commas")
    return wanted


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse(argv)
    run = run_of(parser, arguments)
    if run is None:
        parser.error("give a run or a checkpoint, such as udddm sample runs/digits")
    if (arguments.count or 0) > MOST:
        parser.error(f"--count {arguments.count}: more than {MOST} images; use several commands with --seeds")
    check_tasks(parser, arguments)
    if (arguments.autoencoder is None) != (arguments.moments is None):
        parser.error("--autoencoder and --moments go together: the autoencoder, and the group of the latents")

    def body() -> int:
        import itertools
        import time

        from udddm.runs.model import load_model
        from udddm.tools import pictures

        began = time.monotonic()
        model = load_model(
            run,
            ema=arguments.ema,
            ema_length=arguments.ema_length,
            device=arguments.device,
            trust=arguments.trust,
        )
        given = Given(arguments, model)
        seeds = given.seeds(DEFAULT_COUNT)
        labels = None
        if arguments.labels is not None:
            labels = list(itertools.islice(itertools.cycle(arguments.labels), len(seeds)))
        loaded = time.monotonic()
        images = given.draw(seeds, labels)
        if arguments.autoencoder is not None:
            images = _decoded(images, arguments.autoencoder, arguments.moments, str(model.device))
        drawn = time.monotonic()
        out: Path = arguments.out or Path("samples") / name_of(run)
        classes = model.config.network.classes
        by_class = labels is None and not given.used and 2 <= classes <= 20
        columns = classes if by_class else None  # one column per class
        written = pictures.save(out, images, seeds, labels or given.labels(seeds), arguments.save, columns)
        spent = drawn - loaded
        print(
            f"{len(images)} images in {spent:.2f} s ({1e3 * spent / len(images):.3g} ms each; loading the model took "
            f"{loaded - began:.2f} s): {', '.join(written)}"
        )
        return 0

    return reported(body)


def _decoded(latents: Any, autoencoder: Path, moments: str, device: str) -> Any:
    """The images [N, 3, H, W] of latents [N, C, h, w]."""
    import numpy as np
    import torch

    from udddm.tools.dataset.latents import Decoder

    decoder = Decoder(moments, autoencoder, device)
    decoder.check(latents.shape[1], "this model")
    parts = [decoder(part) for part in torch.split(torch.from_numpy(latents), DECODED_AT_ONCE)]
    return np.concatenate([part.numpy() for part in parts])


if __name__ == "__main__":
    sys.exit(main())
