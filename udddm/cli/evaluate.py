"""The command `udddm evaluate`: scores of a model or of samples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udddm.cli import references, sweep
from udddm.cli.arguments import Parser, check_exists, is_override
from udddm.cli.command import TRUST, add_guidance_and_average, add_sampler, add_version, path, positive, reported

if TYPE_CHECKING:
    import torch

    from udddm.backends.distributed.ranks import Ranks
    from udddm.cli.references import Target
    from udddm.config import DataConfig, RunConfig
    from udddm.data import ImageDataset
    from udddm.evaluation.features import FeatureNetwork
    from udddm.runs.model import Model


def _parser() -> Parser:
    parser = Parser(
        prog="udddm evaluate",
        description="Score a model, or samples, against a data set. Under torchrun, the ranks share the sampling.",
        epilog="udddm evaluate runs/digits --nfe 4 --features my_features.pt",
    )
    parser.overrides = True
    parser.add_argument(
        "given",
        nargs="*",
        metavar="RUN|KEY=VALUE",
        help="a run directory or URL, or one of its checkpoints; settings of its data, such as data.path=FOLDER",
    )
    parser.add_argument("--checkpoint", metavar="RUN", help="the same as RUN")
    parser.add_argument(
        "--samples", type=path, metavar="FILE", help="a .npy file of images: float in [-1, 1], or uint8"
    )
    parser.add_argument("--config", metavar="NAME|FILE", help="the preset that names the data set, for --samples")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="the same without --set")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    references.add_networks(parser)
    parser.add_argument(
        "--metrics",
        metavar="NAME,...",
        help="metrics to compute (default: all): frechet, kid, precision-recall, spread, inception-score, or "
        "package.module:function",
    )
    references.add_references(parser)
    parser.add_argument(
        "--count", type=positive, default=50_000, metavar="N", help="number of samples (default 50,000)"
    )
    add_sampler(parser)
    add_guidance_and_average(parser, sweep.lengths)
    parser.add_argument(
        "--repeat", type=positive, default=1, metavar="R", help="repetitions with other seeds (default 1)"
    )
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first seed (default 0)")
    parser.add_argument("--batch", type=positive, default=250, metavar="N", help="batch size of sampling (default 250)")
    parser.add_argument("--cache", type=path, metavar="DIR", help="directory for the statistics of data sets")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the scores to this JSON file")
    parser.add_argument(
        "--plot", type=path, metavar="FILE", help="draw the scores of a range of --ema-length as a PNG or SVG"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse(argv)
    _check(parser, arguments)
    wanted = arguments.ema_length if isinstance(arguments.ema_length, tuple) else None
    if arguments.plot and wanted is None:
        parser.error("--plot draws the scores of a range of lengths: add --ema-length FROM:TO")

    def body() -> int:
        from udddm.backends.distributed.ranks import join
        from udddm.files import make_directory, write_json

        ranks = join(arguments.device)

        def one(length: float) -> dict[str, Any] | None:
            return _evaluate(argparse.Namespace(**{**vars(arguments), "ema_length": length}), ranks)

        try:
            found = _evaluate(arguments, ranks) if wanted is None else sweep.run(wanted, one)
        finally:
            ranks.close()
        if found is None:
            return 0
        for file in (arguments.json, arguments.plot):
            if file:
                make_directory(file.parent)
        if arguments.json:
            write_json(arguments.json, found)
        if arguments.plot:
            sweep.plot(found, arguments.plot)
        print("\n".join(_table(found) if wanted is None else sweep.table(found)))
        return 0

    return reported(body)


def _check(parser: Parser, arguments: argparse.Namespace) -> None:
    """Sort the positional arguments into `checkpoint` and `set`. Ends the command if they do not fit."""
    runs = [text for text in arguments.given if not is_override(text)]
    arguments.set += [text for text in arguments.given if is_override(text)]
    if arguments.checkpoint is not None:
        runs.append(arguments.checkpoint)
    if len(set(runs)) > 1:
        parser.error(f"several runs: {', '.join(runs)}; give one")
    arguments.checkpoint = runs[0] if runs else None
    if (arguments.checkpoint is None) == (arguments.samples is None):
        parser.error("give either a run, such as udddm evaluate runs/digits, or --samples FILE")
    if arguments.checkpoint is not None:
        check_exists(parser, arguments.checkpoint)
    elif not arguments.samples.exists():
        parser.error(f"--samples {arguments.samples}: this file does not exist")
    if arguments.samples and arguments.repeat > 1:
        parser.error("--repeat generates new samples each time, so it needs a run")
    if arguments.checkpoint and arguments.config:
        parser.error("--config names the data set of --samples; a run has its own, which data.path=... replaces")
    references.check(parser, arguments)


def _check_overrides(overrides: list[str]) -> None:
    """Raise ConfigError for a setting that scores do not depend on."""
    from udddm.config import keys_set
    from udddm.errors import ConfigError

    for override in overrides:
        for key in keys_set(override):
            if not key.startswith(("data.", "published")):
                option = {"train.steps": "--steps", "sample.steps": "--steps", "train.batch_size": "--batch"}.get(key)
                hint = f"; write {option} {override.partition('=')[2]}" if option else ""
                raise ConfigError(f"{override} has no effect here, because a model is scored as it is{hint}")


def _evaluate(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:
    """Returns the scores on rank zero, and None on other ranks."""
    from udddm import config as configuration
    from udddm.config.plugins import METRICS
    from udddm.data import ImageDataset, load_dataset
    from udddm.errors import CheckpointError, ConfigError, DataError, StoreError
    from udddm.evaluation import evaluate
    from udddm.evaluation.features import load_features
    from udddm.runs.model import load_model

    _check_overrides(arguments.set)
    for name in references.chosen_metrics(arguments) or ():
        METRICS.load(name)  # errors are reported before anything is computed
    refused = (ConfigError, DataError, CheckpointError, StoreError, OSError)
    networks = ranks.run_on_all(
        lambda: [load_features(name, ranks.device, arguments.weights) for name in arguments.networks], refused
    )
    model, published = None, {}
    if arguments.checkpoint:
        chosen = {"ema": arguments.ema, "ema_length": arguments.ema_length, "trust": arguments.trust}
        model = ranks.run_on_all(lambda: load_model(arguments.checkpoint, **chosen, device=ranks.device), refused)
        trained = model.config
        config = ranks.run_on_all(lambda: _configured(arguments, trained), refused)
        published = config.published.get(arguments.steps, {})
    else:
        config = configuration.load_config(arguments.config, list(arguments.set))

    def load_data() -> tuple[str, ImageDataset]:
        dataset = ImageDataset(load_dataset(config.data))
        if model is not None:
            _check_data(arguments, dataset)
        return config.data.name, dataset

    target = ranks.run_on_all(lambda: references.load(arguments, load_data) if ranks.is_rank_zero else None, refused)
    rows = []
    if model is not None:
        shape = model.shape
        ranks.run_on_all(lambda: None if target is None else target.check(networks, shape), refused)
        for repetition in range(arguments.repeat):
            first = arguments.first_seed + repetition * arguments.count
            rows.append(_share(arguments, (model, config.data), networks, ranks, first))
    elif target is not None:
        shape, features = _features_of_file(arguments.samples, target, networks)
        rows.append(features)
    if target is None:
        return None
    # After the last collective: the statistics of a large data set may take longer than the collectives' timeout.
    scores = references.score_each(networks, rows, target, shape, arguments)
    summaries = [evaluate.summarize(each) for each in scores]
    return {
        "of": str(arguments.checkpoint or arguments.samples),
        "data": target.name,
        "features": networks[0].name,
        "evaluations": arguments.steps if model else None,
        "guidance": arguments.guidance if model else None,
        "repeat": len(rows),
        **evaluate.combined([network.name for network in networks], summaries),
        "published": published,
        "each": scores[0] if len(rows) > 1 else [],
    }


def _features_of_file(path: Path, target: Target, networks: Sequence[FeatureNetwork]) -> tuple[Any, Any]:
    """The shape of the images in an .npy file, and their features [N, D] and logits [N, K] for each network."""
    import torch

    from udddm.evaluation import evaluate
    from udddm.evaluation.features import extract_each

    images = read_samples(path, None if target.dataset is None else target.dataset.shape)
    channels, height, width = images.shape[1:]
    shape = (channels, height, width)
    target.check(networks, shape)
    return shape, extract_each(networks, torch.split(images, evaluate.BATCH))


def _configured(arguments: argparse.Namespace, config: RunConfig) -> RunConfig:
    """The checkpoint's configuration with the overrides of the command line.

    Raises ConfigError, also if it would import code or open files that the user did not name.
    """
    from udddm import config as configuration
    from udddm.config.trust import DATA, check_trusted
    from udddm.runs.own import is_own

    config.check_guidance(arguments.guidance, "--guidance")
    recorded = config.data
    if arguments.set:
        tree = config.model_dump(mode="json")
        for override in arguments.set:
            configuration.apply(tree, override)
        config = configuration.resolve(tree)
    used = arguments.reference is None or config.data.condition.used
    if not arguments.trust and used and not is_own(arguments.checkpoint, recorded):
        check_trusted(config, DATA, str(arguments.checkpoint), arguments.set)
    return config


def _check_data(arguments: argparse.Namespace, dataset: ImageDataset) -> None:
    """Raise DataError unless the data set is the run's training set, or the user selected another with --set."""
    from udddm.config import keys_set
    from udddm.data import check_unchanged
    from udddm.errors import DataError
    from udddm.log import log
    from udddm.runs.pretrained import recorded_data

    recorded = recorded_data(arguments.checkpoint)
    if recorded is None:
        return
    try:
        check_unchanged(recorded, dataset.fingerprint())
    except DataError as error:
        if any(key.startswith("data.") for override in arguments.set for key in keys_set(override)):
            log.warning("scoring against a data set that is not the run's training set, as requested by --set")
            return
        raise DataError(
            f"{str(error).rpartition(';')[0]}. {arguments.checkpoint} cannot be scored against it: give the "
            "training data with --set data.name=... and --set data.path=..., or call udddm.evaluate from Python"
        ) from None


def _share(
    arguments: argparse.Namespace,
    generated: tuple[Model, DataConfig],
    networks: Sequence[FeatureNetwork],
    ranks: Ranks,
    first: int,
) -> Any:
    """Features and logits of all samples for each network, on rank zero. Other ranks return None.

    Each rank generates its part of the samples and sends their features. Seeds start at `first`. `generated` is the
    model, and the data set with the conditioning images of a model with `data.condition`.
    """
    import numpy as np

    from udddm.data import ImageDataset, load_dataset
    from udddm.diffusion.samplers import SamplingOptions
    from udddm.errors import ConfigError, DataError
    from udddm.evaluation.evaluate import prefetch
    from udddm.evaluation.features import extract_each, join
    from udddm.runs.conditions import sample_conditions

    seeds = (first + np.array_split(np.arange(arguments.count), ranks.world_size)[ranks.rank]).tolist()
    batch = min(arguments.batch, arguments.count)
    chosen = arguments.sampler, arguments.guidance, batch, arguments.sampler_settings
    options = SamplingOptions(arguments.steps, *chosen)
    model, data = generated
    rows = None
    if model.conditions is not None:
        rows = ranks.run_on_all(
            lambda: sample_conditions(model.config, ImageDataset(load_dataset(data)), seeds), (DataError, ConfigError)
        )
    drawn = model.batches(seeds, options=options, conditions=rows)
    pieces = [piece for piece in ranks.gather_first(extract_each(networks, prefetch(drawn))) if len(piece[0][0])]
    return [join(parts) for parts in zip(*pieces, strict=True)] or None


def read_samples(file: Path, shape: tuple[int, int, int] | None) -> torch.Tensor:
    """Images [N, *shape], float in [-1, 1], from an .npy file. None: of any shape (C, H, W).

    Raises DataError, which names the file.
    """
    import numpy as np
    import torch

    from udddm.errors import DataError

    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the samples {file}: {error}") from error
    fits = array.ndim == 4 if shape is None else array.shape[1:] == shape
    if not fits or len(array) < 2:
        expected = ", ".join(map(str, shape or ("C", "H", "W")))
        raise DataError(f"{file} has shape {list(array.shape)}: expected two or more images [N, {expected}]")
    if array.dtype == np.uint8:
        return torch.from_numpy(array).float() / 127.5 - 1
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{file} has dtype {array.dtype}: expected uint8, or floats in [-1, 1]")
    images = torch.from_numpy(array).float()
    bad = (~images.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise DataError(f"{file}: sample {int(bad[0])} has values that are not finite")
    return images


_ABOUT = ("of", "data", "features", "evaluations", "guidance", "repeat", "published", "each", "networks")
"""Keys of the result of `_evaluate` that are not metrics."""


def _table(found: dict[str, Any]) -> list[str]:
    from udddm.evaluation.evaluate import notes

    times = f" x {found['repeat']}" if found["repeat"] > 1 else ""
    evaluations = (
        f", {found['evaluations']} evaluation{'s' if found['evaluations'] != 1 else ''}" if found["evaluations"] else ""
    )
    guided = f", guidance {found['guidance']:g}" if found["guidance"] not in (None, 1) else ""
    about = f"{found['of']} ({found['n']} images{times}{evaluations}{guided}"
    lines = []
    for name, scores in {found["features"]: found, **found.get("networks", {})}.items():
        lines += [f"{about}; {name}): {'  '.join(_cells(scores, found['published']))}", *notes(scores)]
    return lines


def _cells(scores: dict[str, Any], published: dict[str, float]) -> list[str]:
    """The scores in one feature space, as `name value`."""
    from udddm.evaluation.evaluate import figures

    names = {"fid": "FID", "fd": "fd", "inception_score": "IS", "kid": "KID", "precision": "P", "recall": "R"}
    cells = []
    for key, name in names.items():
        if key in scores:
            over = f" ± {scores[f'{key}_over_seeds']:.2g}" if f"{key}_over_seeds" in scores else ""
            stated = f" (published {published[key]:g})" if key in published else ""
            cells.append(f"{name} {scores[key]:.4g}{over}{stated}")
    return cells + figures({key: value for key, value in scores.items() if key not in _ABOUT})


if __name__ == "__main__":
    sys.exit(main())
