"""The public functions `train` and `sample`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import yaml

from udddm import config as configuration
from udddm import log
from udddm.backends.distributed.ranks import TIMEOUT
from udddm.backends.launchers import Job, launch
from udddm.config import RunConfig
from udddm.config.plugins import name_of
from udddm.data import MapDataset
from udddm.errors import ConfigError
from udddm.runs.model import Model, SampleOptions, load_model
from udddm.runs.result import TrainResult
from udddm.training.callbacks import Given
from udddm.training.callbacks import check as check_callbacks
from udddm.urls import secret_in

Overrides = Mapping[str, Any] | Sequence[str]
Factory = Callable[..., Any] | str
"""A class or function at the top level of a module, or a name: a built-in one, or package.module:name."""


class TrainOptions(TypedDict, total=False):
    """The other arguments of `train`."""

    device: str
    """auto, cpu or cuda."""
    backend: Factory
    """Launcher of the workers: auto, local, ray, or a custom launcher."""
    max_failures: int
    """Restarts after a worker was killed or hung."""
    timeout: float
    """Seconds after which a collective operation counts as hung."""
    callbacks: Sequence[Given]
    """Called during training on the first rank: objects of subclasses of `Callback`, functions that return one, or
    their names."""
    extend: bool
    """Whether the run in `run_dir` may be a shorter one of the same configuration, which then becomes longer."""
    store: Factory
    """Replaces store.kind."""
    network: Factory
    """Replaces network.name."""
    objective: Factory
    """Replaces objective.name."""
    engine: Factory
    """Replaces engine.name."""
    schedule: Factory
    """Replaces schedule.kind."""
    sampler: Factory
    """Replaces sample.sampler."""


_PLUGINS = {
    "store": "store.kind",
    "network": "network.name",
    "objective": "objective.name",
    "engine": "engine.name",
    "schedule": "schedule.kind",
    "sampler": "sample.sampler",
}


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    dataset: MapDataset | Callable[[], MapDataset] | None = None,
    *,
    run_dir: str | Path,
    overrides: Overrides = (),
    workers: int | tuple[int, int] = 1,
    **options: Unpack[TrainOptions],
) -> TrainResult:
    """Train the run in `run_dir`, or resume it.

    Args:
        config: a RunConfig, the path of a YAML file, or a dict of its sections.
        dataset: any map-style object with `len(dataset)`, where `dataset[i]` is an image [C, H, W] in [-1, 1] (or
            uint8), or an (image, label) pair; or a function that returns such an object, which every worker calls.
            None: `config.data` is loaded.
        run_dir: the directory or URL of the run. Repeating the call resumes the run.
        overrides: changes to the configuration, as {"train.steps": 500} or ["train.steps=500"].
        workers: the number of processes, or (minimum, maximum).
        **options: `device` (auto, cpu, cuda), `backend` (auto, local, ray, or a custom launcher), `max_failures`
            (restarts after a worker was killed or hung), `timeout` (seconds after which a collective counts as hung),
            `callbacks` (docs/callbacks.md; with several workers they are pickled, or imported by their names), `extend`
            (whether a shorter run of the same configuration in `run_dir` becomes longer: `udddm train --continue`);
            and `store`, `network`, `objective`, `engine`, `schedule` and `sampler`, which replace the name in the
            configuration with a custom factory (docs/extending.md): a class or function at the top level of a module,
            or "package.module:name".

    Raises ConfigError, DataError, StoreError, CheckpointError, Diverged, Interrupted, RankError or WorkerLost, all
    subclasses of UdddmError. Checkpoints stay intact in every case, and repeating the call resumes the run.
    """
    unknown = [name for name in options if name not in TrainOptions.__annotations__]
    if unknown:
        known = ", ".join(["overrides", "workers", *TrainOptions.__annotations__])
        raise TypeError(
            f"train() has no argument {unknown[0]!r}; in addition to config, dataset and run_dir, it takes {known}"
        )
    log.install()
    members = {key: value for key, value in options.items() if key in _PLUGINS}
    resolved = _resolved(config, overrides, members)
    _check_arguments(run_dir, options)
    _refuse_secrets(resolved, run_dir)
    job = Job(
        config=resolved,
        run_dir=run_dir,
        dataset=dataset,
        device=options.get("device", "auto"),
        workers=_range_of_workers(workers),
        max_failures=options.get("max_failures", 0),
        timeout=options.get("timeout", TIMEOUT),
        callbacks=tuple(options.get("callbacks", ())),
        extend=options.get("extend", False),
    )
    try:
        return launch(job, name_of(options.get("backend", "auto"), "backend"))
    except ConfigError as error:
        # a mistake in the call, whose line ends the traceback
        raise error.with_traceback(None) from None


def _resolved(config: Any, overrides: Overrides, members: Mapping[str, Any]) -> RunConfig:
    """The configuration with the overrides and factories of the caller applied. Raises ConfigError."""
    if isinstance(overrides, Mapping):
        changes = [_override(key, value) for key, value in overrides.items()]
    elif isinstance(overrides, (list, tuple)) and all(isinstance(each, str) for each in overrides):
        changes = list(overrides)
    else:
        raise ConfigError(f"overrides: give a dict or a list such as ['train.steps=500'], not {overrides!r}")
    changes += [f"{_PLUGINS[what]}={name_of(factory, what)}" for what, factory in members.items()]
    source = "the configuration"
    if isinstance(config, (str, Path)):
        return configuration.load_config(config, changes)
    if isinstance(config, RunConfig):
        if not changes:
            return config
        tree = config.model_dump(mode="json")
    elif isinstance(config, Mapping):
        tree = dict(config)
    else:
        raise ConfigError(
            f"config: give a RunConfig, the path of a YAML file or a dict of sections, not a {type(config).__name__}"
        )
    return configuration.resolve(configuration.overridden(tree, changes, source), source)


def _override(key: str, value: Any) -> str:
    try:
        return f"{key}={configuration.as_yaml(str(value) if isinstance(value, Path) else value)}"
    except yaml.YAMLError:
        raise ConfigError(f"overrides: {key} is a {type(value).__name__}; give a number, text, list or dict") from None


def _check_arguments(run_dir: object, options: TrainOptions) -> None:
    """Raise ConfigError for an argument of a wrong type or out of range."""
    if not isinstance(run_dir, (str, Path)) or not str(run_dir).strip():
        raise ConfigError(f"run_dir={run_dir!r}: give a directory or URL, such as 'runs/mine'")
    check_callbacks(options.get("callbacks", ()))
    failures: object = options.get("max_failures", 0)
    if isinstance(failures, bool) or not isinstance(failures, int) or failures < 0:
        raise ConfigError(f"max_failures={failures!r}: give the number of restarts, 0 or more")
    timeout: object = options.get("timeout", TIMEOUT)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ConfigError(f"timeout={timeout!r}: give a number of seconds above 0")


def _refuse_secrets(config: RunConfig, run_dir: str | Path) -> None:
    """Raise ConfigError for a URL that contains a secret: run.json and every checkpoint would record it."""
    urls = {
        "the run directory": str(run_dir),
        "store.url": config.store.url,
        "data.path": config.data.path,
        "data.condition.path": config.data.condition.path,
        "train.init_from": config.train.init_from,
        **{f"evaluate.{name}_weights": place for name, place in config.evaluate.weights.items()},
        "evaluate.reference": config.evaluate.reference,
    }
    for key, url in urls.items():
        if url is not None and (what := secret_in(url.partition("#sha256=")[0])):
            raise ConfigError(
                f"{key}: remove the {what} from the URL, which is recorded in run.json and every checkpoint. Pass "
                "credentials through the environment or fsspec's configuration files, or copy the files to a local disk"
            )


def _range_of_workers(workers: object) -> tuple[int, int]:
    """(minimum, maximum). Raises ConfigError."""
    given = workers if isinstance(workers, (tuple, list)) else (workers, workers)
    if len(given) == 2 and all(isinstance(each, int) and not isinstance(each, bool) for each in given):
        least, most = given
        if 1 <= least <= most:
            return least, most
    raise ConfigError(f"workers={workers!r}: give a positive number, or a minimum and a maximum such as (1, 8)")


def sample(
    model: Model | str | Path, seeds: Sequence[int], *, trust: bool = False, **options: Unpack[SampleOptions]
) -> npt.NDArray[np.float32]:
    """`Model.sample` of a model, or of the run, checkpoint or release at a path or URL.

    `options` are the other arguments of `Model.sample`; `trust` is that of `load_model`.
    """
    loaded = model if isinstance(model, Model) else load_model(model, trust=trust)
    return loaded.sample(seeds, **options)
