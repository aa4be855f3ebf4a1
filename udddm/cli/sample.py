"""The command udddm-sample: images from a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from udddm.cli.command import TRUST, add_guidance_and_average, add_sampler, add_version, integers, path, reported


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="udddm-sample", description="Generate images. Each depends only on its seed and label."
    )
    parser.add_argument("--checkpoint", metavar="RUN", required=True, help="a run directory or one of its checkpoints")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="network evaluations per image (default 1)")
    add_sampler(parser)
    parser.add_argument("--seeds", type=integers, default=list(range(64)), metavar="0-999", help="default 0-63")
    parser.add_argument(
        "--labels",
        type=integers,
        metavar="0-9",
        help="class labels, cycled over the seeds (default: seed modulo number of classes)",
    )
    add_guidance_and_average(parser)
    parser.add_argument(
        "--out", type=path, default=Path(), metavar="DIR", help="directory for samples.npy and samples.png"
    )
    parser.add_argument("--batch", type=int, default=250, metavar="N", help="batch size of sampling (default 250)")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.batch < 1:
        parser.error("--steps and --batch must be at least 1")

    def body() -> int:
        import itertools

        import torch

        from udddm.files import write_array
        from udddm.image_grid import save_image_grid
        from udddm.runs.model import load_model

        model = load_model(
            arguments.checkpoint,
            ema=arguments.ema,
            ema_length=arguments.ema_length,
            device=arguments.device,
            trust=arguments.trust,
        )
        labels = None
        if arguments.labels is not None:
            labels = list(itertools.islice(itertools.cycle(arguments.labels), len(arguments.seeds)))
        images = model.sample(
            arguments.seeds,
            steps=arguments.steps,
            sampler=arguments.sampler,
            settings=arguments.sampler_settings,
            labels=labels,
            guidance=arguments.guidance,
            batch=arguments.batch,
        )
        out: Path = arguments.out
        out.mkdir(parents=True, exist_ok=True)
        write_array(out / "samples.npy", images)
        save_image_grid(torch.from_numpy(images[:400]), out / "samples.png")
        print(
            f"{len(images)} images in {out / 'samples.npy'}, the first {min(400, len(images))} in {out / 'samples.png'}"
        )
        return 0

    return reported(body)


if __name__ == "__main__":
    sys.exit(main())
