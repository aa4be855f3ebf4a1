"""The commands udddm-train, udddm-sample, udddm-store (udddm-evaluate: evaluation/command.py).

Heavy imports wait until the arguments are parsed.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path

FAILED = 1
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
"""Errors of a disk, which are for the user."""
USAGE = 2
TRUST = "import and open what the checkpoint's own configuration names, such as its data set: for files that you trust"
"""Help for `--trust` (udddm/data/trust.py)."""


def version() -> str:
    from udddm import __version__

    return __version__


def reported(body: Callable[[], int]) -> int:
    """Turn the errors that are for the user into one message and an exit code; let the others show their trace."""
    from udddm.errors import ConfigError

    try:
        return body()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except Exception as error:
        from udddm.backends.launchers.base import USER_ERRORS
        from udddm.errors import Interrupted, WorkerLost

        if isinstance(error, Interrupted):
            print(str(error), file=sys.stderr)
            return error.exit_code
        if isinstance(error, (*USER_ERRORS, WorkerLost)):
            print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
            return FAILED
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f" ({error.filename})" if error.filename else ""
            print(
                f"error: {error.strerror}{where}. Checkpoints and earlier files are intact; make room or restore "
                "access, then run the same command again",
                file=sys.stderr,
            )
            return FAILED
        raise
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is intact and the same command resumes", file=sys.stderr)
        return 130


def _workers(text: str) -> tuple[int, int]:
    """`4` or `2:8`."""
    low, separator, high = text.partition(":")
    try:
        least, most = int(low), int(high) if separator else int(low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of workers, or MIN:MAX") from None
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1 worker, and MIN no more than MAX")
    return least, most


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="udddm-train",
        description="Train a one-step image generator. The same command again resumes the run.",
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML preset, such as configs/digits.yaml")
    parser.add_argument("--run-dir", metavar="DIR|URL", help="where everything goes (default: runs/<preset>)")
    parser.add_argument("--store", choices=["gpu", "pinned", "zarr"], help="where the x0-state lives (store.kind)")
    parser.add_argument("--store-url", metavar="URL", help="where the zarr store is (store.url; default: <run>/state)")
    parser.add_argument(
        "--on-damage", choices=["stop", "reinitialize"], help="what a damaged chunk of state does (store.on_corruption)"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a value, such as train.epochs=3"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--engine", choices=["torch", "deepspeed"], help="what takes the steps (engine.name)")
    parser.add_argument("--zero", type=int, choices=range(4), help="DeepSpeed's ZeRO stage (engine.zero)")
    parser.add_argument("--deepspeed", metavar="FILE", help='a DeepSpeed JSON; its "auto" values are filled in')
    cluster = parser.add_argument_group("workers")
    cluster.add_argument(
        "--backend", choices=["auto", "local", "ray"], default="auto", help="who starts them (auto: Ray in a Ray job)"
    )
    cluster.add_argument(
        "--workers", type=_workers, default=(1, 1), metavar="N|MIN:MAX", help="processes, one a GPU (default 1)"
    )
    cluster.add_argument(
        "--max-failures", type=int, default=0, metavar="N", help="restarts after a lost or hung worker (default 0)"
    )
    cluster.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="a collective that takes longer is hung (600)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and what it needs, and stop")
    parser.add_argument("--version", action="version", version=version())
    return parser


def train(argv: list[str] | None = None) -> int:
    arguments = _train_parser().parse_args(argv)

    def body() -> int:
        from udddm import config as configuration

        overrides = list(arguments.set)
        if arguments.store:
            overrides.append(f"store.kind={arguments.store}")
        if arguments.store_url:
            overrides.append(f"store.url={arguments.store_url}")
        if arguments.on_damage:
            overrides.append(f"store.on_corruption={arguments.on_damage}")
        if arguments.engine or arguments.deepspeed:
            overrides.append(f"engine.name={arguments.engine or 'deepspeed'}")
        if arguments.zero is not None:
            overrides.append(f"engine.zero={arguments.zero}")
        if arguments.deepspeed:
            import json

            from udddm.backends.engines.deepspeed_config import read

            overrides.append(f"engine.deepspeed={json.dumps(read(arguments.deepspeed))}")
        config = configuration.load_config(arguments.config, overrides)
        name = Path(arguments.config).stem if arguments.config else "default"
        run = arguments.run_dir or Path("runs") / name
        if arguments.dry_run:
            from udddm.tools.dry_run import plan

            for line in plan(config, arguments.device):
                print(line)
            return 0
        from udddm.api import train as run_training

        run_training(
            config,
            run_dir=run,
            device=arguments.device,
            backend=arguments.backend,
            workers=arguments.workers,
            max_failures=arguments.max_failures,
            timeout=arguments.timeout,
        )
        return 0

    return reported(body)


def _seeds(text: str) -> list[int]:
    """`0-999`, `7`, `1,5,9` and mixtures."""
    seeds: list[int] = []
    for part in text.split(","):
        first, separator, last = part.partition("-")
        try:
            low = int(first)
            high = int(last) if separator else low
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write seeds as 0-999 or 1,5,9") from None
        if high < low:
            raise argparse.ArgumentTypeError(f"{part!r}: the last seed is below the first")
        seeds += range(low, high + 1)
    return seeds


def _sample_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="udddm-sample", description="Generate images. Each depends on its seed (and label) alone."
    )
    parser.add_argument("--checkpoint", metavar="RUN", required=True, help="a run directory or one of its checkpoints")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="network evaluations an image (default 1)")
    parser.add_argument("--sampler", choices=["renoise", "algorithm-2", "heun"], default="renoise")
    parser.add_argument("--seeds", type=_seeds, default=list(range(64)), metavar="0-999", help="default 0-63")
    parser.add_argument(
        "--labels",
        type=_seeds,
        metavar="0-9",
        help="class labels, repeated over the seeds (default: seed modulo classes)",
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="W", help="weight of the labels (default 1: plain sampling)"
    )
    average = parser.add_mutually_exclusive_group()
    average.add_argument(
        "--ema", metavar="NAME", help="which average of the weights: a decay, power-LENGTH, or 'none' for no average"
    )
    average.add_argument(
        "--ema-length", type=float, metavar="S", help="make the average of this relative length, of train.power_ema's"
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="samples.npy and samples.png go here")
    parser.add_argument("--batch", type=int, default=250, metavar="N", help="images made at once (default 250)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--version", action="version", version=version())
    return parser


def sample(argv: list[str] | None = None) -> int:
    parser = _sample_parser()
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.batch < 1:
        parser.error("--steps and --batch must be at least 1")

    def body() -> int:
        import itertools

        import torch

        from udddm.api import load_model
        from udddm.api import sample as draw
        from udddm.errors import ConfigError
        from udddm.files import write_array
        from udddm.image_grid import save_image_grid

        model = load_model(
            arguments.checkpoint, ema=arguments.ema, ema_length=arguments.ema_length, device=arguments.device
        )
        labels = None
        if arguments.labels is not None:
            if max(arguments.labels) >= model.config.network.classes:
                raise ConfigError(f"--labels: the model has {model.config.network.classes} classes, numbered from 0")
            labels = list(itertools.islice(itertools.cycle(arguments.labels), len(arguments.seeds)))
        images = draw(
            model,
            arguments.seeds,
            steps=arguments.steps,
            sampler_name=arguments.sampler,
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


def _shape(text: str) -> tuple[int, ...]:
    try:
        sides = tuple(int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write the shape as 3x32x32") from None
    if len(sides) != 3 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write the shape as CHANNELSxHEIGHTxWIDTH, such as 3x32x32")
    return sides


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _store_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="udddm-store", description="Look into x0-state stores, copy, clean, plan and measure them."
    )
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(dest="command", required=True)
    dtypes = ["fp32", "fp16", "bf16", "uint8"]
    for name, text in (
        ("info", "what the store holds; writes nothing, safe beside a live run"),
        ("verify", "check every chunk's checksum; exits 1 and lists what is damaged; safe beside a live run"),
        ("view", "one sample's estimates through the kept generations beside its image, as a PNG"),
        ("convert", "copy the newest state to another path or URL, in this or another dtype"),
        ("gc", "remove the generations that no checkpoint of a stopped run refers to"),
        ("plan", "what a data set's state needs: bytes, memory, bandwidth, requests, and which store fits"),
        ("bench", "what this machine and a URL give, against what the plan needs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if name != "plan":
            command.add_argument("path", metavar="RUN|URL", help="a run directory, or the store's own path or URL")
        if name == "view":
            command.add_argument("--sample", type=int, required=True, metavar="I")
            command.add_argument("--out", type=Path, default=Path("view.png"), metavar="FILE")
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
            command.add_argument("--batch", type=positive, default=1024, help="samples of a step, over all workers")
        if name == "bench":
            command.add_argument("--threads", type=positive, default=8)
    return parser


def store(argv: list[str] | None = None) -> int:
    arguments = _store_parser().parse_args(argv)

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
                "\n".join(damaged) if damaged else f"{chunks} chunks and {len(place.checkpoints)} checkpoints are whole"
            )
            return FAILED if damaged else 0
        elif arguments.command == "convert":
            print(convert.convert(place, arguments.destination, arguments.dtype))
        else:
            _view(place, arguments.sample, arguments.out, arguments.trust)
        return 0

    return reported(body)


def _plan_store(arguments: argparse.Namespace) -> int:
    from udddm.storage.base import open_object_store
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

    from udddm.data import ImageDataset, load_dataset
    from udddm.data.trust import reaching
    from udddm.image_grid import save_image_grid
    from udddm.tools import inspect
    from udddm.urls import redact

    assert isinstance(place, inspect.Place)
    found = inspect.estimates(place, sample)
    names, images = [name for name, _ in found], [image for _, image in found]
    unasked = reaching(place.config.data) if place.config is not None and not trust else []
    if unasked:
        named = redact(", ".join(unasked))
        print(
            f"the image is left out: the configuration of {place.name} names its data set by {named}, and "
            "nothing of it is imported or opened unless --trust is given",
            file=sys.stderr,
        )
    elif place.config is not None:
        image, _ = ImageDataset(load_dataset(place.config.data)).batch(np.array([sample]))
        names.insert(0, "the image")
        images.insert(0, image[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_image_grid(torch.stack(images), out, columns=len(images), side=128)
    print(f"sample {sample} in {out}, left to right: {', '.join(names)}")


if __name__ == "__main__":
    sys.exit(train())
