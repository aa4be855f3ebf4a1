"""The public functions that are more than one module's: `train` and `sample`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from udddm import config as configuration
from udddm import log
from udddm.backends.distributed.ranks import TIMEOUT
from udddm.backends.launchers import Job, launch
from udddm.config import RunConfig
from udddm.config.plugins import name_of
from udddm.data import MapDataset
from udddm.errors import ConfigError
from udddm.runs.model import Model, load_model
from udddm.runs.result import TrainResult
from udddm.urls import secret_in

Overrides = Mapping[str, Any] | Sequence[str]


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    dataset: MapDataset | Callable[[], MapDataset] | None = None,
    *,
    run_dir: str | Path,
    overrides: Overrides = (),
    workers: int | tuple[int, int] = 1,
    **options: Any,
) -> TrainResult:
    """Train, or resume, the run in `run_dir`, a directory or a URL.

    Args:
        config: a RunConfig, the path of a YAML file, or a dict of its sections.
        dataset: any map-style object: `len(dataset)` and `dataset[i]` giving an image [C, H, W] in [-1, 1] (or uint8),
            or an (image, label) pair; or a function that returns one, which every worker calls. Without it,
            `config.data` is loaded.
        run_dir: where everything goes; the same call resumes it.
        overrides: changes to the configuration, as {"train.steps": 500} or ["train.steps=500"].
        workers: processes, a number or (least, most).
        **options: `device` (auto, cpu, cuda), `backend` (auto, local, ray, or a launcher of your own), `max_failures`
            (restarts after a worker was killed or did not answer), `timeout` (seconds until a collective counts as
            hung); and, instead of a name in the configuration, the factory of your own `store`, `network`,
            `objective`, `engine`, `schedule` or `sampler` (docs/extending.md): a class or function at the top level
            of a module, or "package.module:name".

    Raises ConfigError, DataError, StoreError, CheckpointError, Diverged, Interrupted, RankError or WorkerLost (all
    UdddmError). None of them loses anything that a checkpoint holds, and the same call resumes.
    """
    log.install()
    resolved = _resolved(config, overrides, {key: options.pop(key) for key in list(options) if key in _PLUGINS})
    _refuse_secrets(resolved, run_dir)
    job = _job(resolved, dataset, run_dir, workers, options)
    return launch(job, name_of(options.get("backend", "auto"), "backend"))


_PLUGINS = {
    "store": "store.kind",
    "network": "network.name",
    "objective": "objective.name",
    "engine": "engine.name",
    "schedule": "schedule.kind",
    "sampler": "sample.sampler",
}
_OPTIONS = {"device": "auto", "backend": "auto", "max_failures": 0, "timeout": TIMEOUT}


def _resolved(config: Any, overrides: Overrides, members: Mapping[str, Any]) -> RunConfig:
    """The configuration with overrides and members of the caller's. Raises ConfigError."""
    changes = [f"{_PLUGINS[what]}={name_of(factory, what)}" for what, factory in members.items()]
    if isinstance(overrides, Mapping):
        changes = [f"{key}={configuration.as_yaml(value)}" for key, value in overrides.items()] + changes
    elif isinstance(overrides, str):
        raise ConfigError(f"overrides: give a dict or a list such as ['train.steps=500'], not the text {overrides!r}")
    else:
        changes = [*overrides, *changes]
    if isinstance(config, (str, Path)):
        return configuration.load_config(config, changes)
    if isinstance(config, RunConfig):
        if not changes:
            return config
        tree, source = config.model_dump(mode="json"), "the configuration"
    elif isinstance(config, Mapping):
        tree, source = dict(config), "the configuration"
    else:
        raise ConfigError(
            f"config: give a RunConfig, the path of a YAML file or a dict of sections, not a {type(config).__name__}"
        )
    return configuration.resolve(configuration.overridden(tree, changes, source), source)


def _refuse_secrets(config: RunConfig, run_dir: str | Path) -> None:
    """Raise ConfigError for a URL with a secret in it, before it is written into run.json and every checkpoint."""
    urls = {
        "the run directory": str(run_dir),
        "store.url": config.store.url,
        "data.path": config.data.path,
        "train.init_from": config.train.init_from,
    }
    for key, url in urls.items():
        if url is not None and (what := secret_in(url)):
            raise ConfigError(
                f"{key}: leave the {what} out of the URL, which is written into run.json and every checkpoint. Give "
                "credentials by the environment or by fsspec's configuration files, or copy the files to a local disk"
            )


def _job(
    config: RunConfig, dataset: Any, run_dir: str | Path, workers: int | tuple[int, int], options: Mapping[str, Any]
) -> Job:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        known = ", ".join([*_OPTIONS, *_PLUGINS])
        raise TypeError(f"train() has no argument {unknown[0]!r}; besides config, dataset, run_dir: {known}")
    given = {**_OPTIONS, **options}
    wanted = (workers, workers) if isinstance(workers, int) else tuple(workers)
    if len(wanted) != 2 or not 1 <= wanted[0] <= wanted[1]:
        raise ConfigError(f"workers {workers!r}: give a positive number, or the least and the most")
    names = {field.name for field in fields(Job)}
    return Job(
        config=config,
        run_dir=run_dir,
        dataset=dataset,
        workers=wanted,
        **{key: value for key, value in given.items() if key in names},
    )


def sample(
    model: Model | str | Path,
    seeds: Sequence[int],
    *,
    steps: int = 1,
    sampler_name: str | Callable[..., Any] = "renoise",
    settings: Mapping[str, Any] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    batch: int = 250,
    trust: bool = False,
) -> npt.NDArray[np.float32]:
    """`Model.sample` of a model, or of the run, checkpoint or release at a path or URL (`load_model`)."""
    loaded = model if isinstance(model, Model) else load_model(model, trust=trust)
    return loaded.sample(
        seeds,
        steps=steps,
        sampler=sampler_name,
        settings=settings,
        labels=labels,
        guidance=guidance,
        batch=batch,
    )
