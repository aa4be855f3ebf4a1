"""What `udddm evaluate` compares samples with: the data set, a file of reference statistics, and held-out images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udddm.cli.arguments import Parser
from udddm.cli.command import path

if TYPE_CHECKING:
    from udddm.data import ImageDataset
    from udddm.evaluation.features import FeatureNetwork, Rows
    from udddm.evaluation.metrics import Reference
    from udddm.evaluation.reference import ReferenceFile


def add_networks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        default="inception",
        metavar="NET,...",
        help="feature networks, separated by commas: inception (default), dinov2, a TorchScript file or "
        "package.module:function. The last two are programs that run with your permissions: use only those that you "
        "trust",
    )
    parser.add_argument(
        "--inception-weights",
        metavar="FILE|URL",
        help="Inception's weights, if they are not to be downloaded; other weights than the published ones are written "
        "FILE#sha256=HEX",
    )
    parser.add_argument("--dinov2-weights", metavar="FILE|URL", help="the same for dinov2")


def add_references(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference",
        type=path,
        metavar="FILE",
        help="compare with this .npz file instead of the data set: mu and sigma (EDM), or arr_0 (guided-diffusion)",
    )
    parser.add_argument(
        "--held-out",
        metavar="DATA",
        help="a folder or array of real images that are not in the data set: adds fd_ratio, the Frechet distance "
        "relative to theirs",
    )


def check(parser: Parser, arguments: argparse.Namespace) -> None:
    """End the command if options about networks and references do not fit each other."""
    from udddm.config.evaluate import check_weights, split_networks

    weights = {"inception": arguments.inception_weights, "dinov2": arguments.dinov2_weights}
    try:
        networks = split_networks(arguments.features)
        check_weights(networks, weights, "--{}-weights", "--features")
    except ValueError as error:
        parser.error(f"--features {error}" if str(error).startswith("'") else str(error))
    arguments.networks, arguments.weights = networks, weights
    if arguments.reference is None:
        return
    if arguments.config:
        parser.error("--config names a data set, and --reference replaces it: give one")
    ignored = [text for text in arguments.set if text.partition("=")[0].strip().partition(".")[0] == "data"]
    if ignored:
        parser.error(f"{ignored[0]} has no effect, because --reference replaces the data set")


@dataclass(frozen=True)
class Target:
    """What samples are compared with. Either a data set or a file; with or without held-out images."""

    name: str
    dataset: ImageDataset | None
    file: ReferenceFile | None
    others: ImageDataset | None

    def check(self, networks: Sequence[FeatureNetwork], shape: tuple[int, int, int]) -> None:
        """Raise ConfigError or DataError if samples of `shape` (C, H, W) cannot be compared with this."""
        from udddm.evaluation import evaluate
        from udddm.evaluation.features import check_channels

        if self.others is not None:
            evaluate.check_same_size("--held-out", self.others.shape, shape)
        for network in networks:
            check_channels(network.name.partition("#")[0], shape[0])
            if self.file is not None:
                evaluate.check_reference(self.file, network, shape)

    def reference(self, network: FeatureNetwork, shape: tuple[int, int, int], cache: Path | None) -> Reference:
        """Statistics for samples of `shape` (C, H, W). Raises DataError if the file's are of another network."""
        from udddm.evaluation import evaluate

        if self.file is not None:
            return evaluate.reference_of(self.file, network, shape, cache)
        assert self.dataset is not None
        return evaluate.reference(self.dataset, network, cache)

    def held_out(self, networks: Sequence[FeatureNetwork]) -> list[Rows | None]:
        """Features of the held-out images, for each network; None without such images."""
        from udddm.evaluation import evaluate

        if self.others is None:
            return [None] * len(networks)
        return [features for features, _ in evaluate.features_of(self.others, networks)]


def load(arguments: argparse.Namespace, dataset: Callable[[], tuple[str, ImageDataset]]) -> Target:
    """What the options name. `dataset` loads the data set and its name, unless --reference replaces it.

    Raises the errors of both, and ConfigError for --metrics that the reference does not allow.
    """
    from udddm.config import DataConfig
    from udddm.data import ImageDataset, load_dataset
    from udddm.evaluation import evaluate
    from udddm.evaluation.reference import read_reference
    from udddm.tools.automatic import data_section

    others = None
    if arguments.held_out:
        others = ImageDataset(load_dataset(DataConfig.model_validate(data_section(arguments.held_out))))
    if arguments.reference is None:
        name, images = dataset()
        return Target(name, images, None, others)
    file = read_reference(arguments.reference)
    evaluate.applicable(chosen_metrics(arguments), file)
    return Target(str(arguments.reference), None, file, others)


def chosen_metrics(arguments: argparse.Namespace) -> list[str] | None:
    """The metrics of --metrics; None without it."""
    return [name.strip() for name in arguments.metrics.split(",")] if arguments.metrics else None


def score_each(
    networks: Sequence[FeatureNetwork],
    repetitions: Sequence[Sequence[tuple[Any, Any]]],
    target: Target,
    shape: tuple[int, int, int],
    arguments: argparse.Namespace,
) -> list[list[dict[str, Any]]]:
    """The scores of each repetition, for each network. `repetitions` have features and logits for each network."""
    from udddm.evaluation import evaluate

    names = evaluate.applicable(chosen_metrics(arguments), target.file, quiet=True)
    found = []
    for index, (network, others) in enumerate(zip(networks, target.held_out(networks), strict=True)):
        real = target.reference(network, shape, arguments.cache)
        rows = []
        for repetition in repetitions:
            features, logits = repetition[index]
            scores = evaluate.score(features, logits, real, network.name, names)
            if others is not None:
                scores |= evaluate.held_out(features, others, real)
            rows.append(scores)
        found.append(rows)
    return found
