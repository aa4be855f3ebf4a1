"""One rank's part of a run, from loading the data set to the result."""

from __future__ import annotations

import platform
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import udddm
from udddm import networks, objectives
from udddm import store as stores
from udddm.backends.distributed.listener import Listener
from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines import memory
from udddm.config import OrderConfig, RunConfig, StoreConfig
from udddm.config.plugins import ENGINES, METRICS, NETWORKS, SAMPLERS, STORES
from udddm.data import ImageDataset, MapDataset, check_agreement, load_dataset
from udddm.diffusion import samplers, schedule
from udddm.errors import CheckpointError, ConfigError, DataError, StoreError
from udddm.files import load_json
from udddm.log import log
from udddm.order import check_world, most_lanes, settled
from udddm.runs import growing, own
from udddm.runs.conditions import conditions_of
from udddm.runs.remote import open_run
from udddm.runs.run import Run, check_or_record, recorded_order, run_id
from udddm.storage import local_path, open_object_store
from udddm.training import spikes
from udddm.training.callbacks import Given, check_loggers
from udddm.training.trainer import Trainer


def train_rank(
    config: RunConfig,
    dataset: MapDataset | None,
    where: str | Path,
    ranks: Ranks,
    listener: Listener | None = None,
    callbacks: Sequence[Given] = (),
    *,
    extend: bool = False,
) -> dict[str, Any]:
    """Train this rank's part of the run in `where`, a directory or URL, after the ranks have joined.

    With `extend`, the run that is there may be a shorter one, and becomes this one (udddm/runs/growing.py).
    Returns the contents of the run's result.json. Raises ConfigError, DataError, StoreError or CheckpointError on every
    rank if any rank cannot start, and the errors of `Trainer.train`.
    """
    refused = (ConfigError, DataError, StoreError, CheckpointError, OSError)
    run = ranks.run_on_all(lambda: open_run(where), refused)

    def load() -> ImageDataset:
        images = ImageDataset(dataset if dataset is not None else load_dataset(config.data))
        if config.network.classes:
            images.check_classes(config.network.classes)
        conditions_of(config, images)
        check_factories(config, images.shape)
        return images

    images = ranks.run_on_all(load, refused)
    if ranks.world_size > 1:
        place = f"rank {ranks.rank} ({socket.gethostname()})"
        seen = ranks.gather((ranks.run_on_all(images.fingerprint, refused), place))
        check_agreement([fingerprint for fingerprint, _ in seen], [place for _, place in seen])
    with ExitStack() as held:

        def take() -> OrderConfig:
            held.enter_context(run.lock())
            return _begin(run, config, images, ranks.world_size, extend=extend)

        order = ranks.run_on_rank_zero(take, refused)
        held.callback(run.leave)
        ranks.run_on_all(lambda: run.check_visible(ranks), refused)
        chosen = store_of(config, images.shape)
        url = stores.find(chosen).shared_location(chosen)
        if url is not None:
            directory = local_path(url)
            if directory is not None:
                ranks.check_shared(directory, "the x0-state's directory")
            else:  # every rank must be able to reach it with the credentials of its machine
                ranks.run_on_all(lambda: open_object_store(url).exists("zarr.json"), refused)
        settings = config.model_copy(update={"order": order})
        return _train(settings, images, run, ranks, (listener, callbacks))


def _begin(run: Run, config: RunConfig, images: ImageDataset, world: int, *, extend: bool) -> OrderConfig:
    """Record a new run, or check that the run is one of `config`, once its lock is held. Returns its order.

    Raises the errors of `train_rank`.
    """
    run.download()
    trained = run.trained()
    known = trained or (run.path / "result.json").exists()
    order = recorded_order(run.path, config) if known else None
    order = order or settled(config.order, len(images), config.train.batch_size, images.shape)
    check_world(most_lanes(order, config.train.batch_size), world)
    config = config.model_copy(update={"order": order})
    if extend:
        growing.extend(run, config, images)
    check_or_record(run.path, config, images, trained=trained)
    own.remember(run_id(run.path), config.data)
    if not known:
        run.discard_state()
    run.persist()
    return order


def check_factories(config: RunConfig, shape: tuple[int, int, int]) -> None:
    """Import the members that the configuration names and validate their settings.

    Raises ConfigError. This runs before the run directory records the configuration. `shape` is (C, H, W).
    """
    for registry, name, settings in (
        (STORES, config.store.kind, config.store.settings),
        (NETWORKS, config.network.name, config.network.settings),
        (ENGINES, config.engine.name, config.engine.settings),
        (SAMPLERS, config.sample.sampler, config.sample.settings),
    ):
        registry.parse(name, registry.load(name), settings)
    if not NETWORKS.is_import(config.network.name):
        networks.outline(config.network, shape)
    samplers.check_evaluations(config.sample.sampler, config.sample.steps, "sample.steps")
    check_loggers(config)
    for metric in config.evaluate.metrics if config.evaluate.every_steps else ():
        METRICS.load(metric)
    store_of(config, shape)


def store_of(config: RunConfig, shape: tuple[int, int, int]) -> StoreConfig:
    """The store that a run uses for images of `shape` (C, H, W). Raises ConfigError."""
    objective = objectives.build(config, schedule.build(config.schedule), 1.0, shape)
    return stores.for_objective(config.store, objective.reads_state)


def _train(
    config: RunConfig,
    images: ImageDataset,
    run: Run,
    ranks: Ranks,
    audience: tuple[Listener | None, Sequence[Given]],
) -> dict[str, Any]:
    def finished() -> dict[str, Any] | None:
        path = run.path / "result.json"
        return load_json(path) if path.exists() else None

    result = ranks.run_on_rank_zero(finished, (CheckpointError,))
    if result is not None:
        if ranks.is_rank_zero:
            log.info(f"{run} is finished; its result is in {run}/result.json")
        return result
    if config.train.torch_threads is not None:
        torch.set_num_threads(config.train.torch_threads)
    memory.check(config, images.shape, ranks)
    back, described = ranks.run_on_rank_zero(lambda: spikes.read(run.path), ()), False
    while True:
        trainer = Trainer(config, images, run, ranks, *audience)
        trainer.stepped_back(back)
        if ranks.is_rank_zero and not described:
            for line in describe(trainer):
                log.info(line)
        described = True
        try:
            return trainer.train()
        except spikes.LossSpike as spike:
            event = spike.event
        del trainer  # its GPU memory, before the next one needs it
        back = ranks.run_on_rank_zero(partial(spikes.add, run.path, event), (OSError,))
        if ranks.is_rank_zero:
            log.warning(spikes.message(event))


def describe(trainer: Trainer) -> list[str]:
    """The first log lines of a run: versions, device, engine, data, objective, store and run directory."""
    config, images, ranks = trainer.config, trainer.dataset, trainer.ranks
    device = ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = "as configured" if config.train.precision != "fp32" else "the default"
    return [
        f"udddm {udddm.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"device: {name}, {ranks.world_size} {'ranks' if ranks.world_size > 1 else 'rank'}; "
        f"engine: {trainer.engine.describe()}; precision: {config.train.precision} ({precision})",
        f"data: {len(images)} images {'x'.join(map(str, images.shape))}; "
        f"objective: {objectives.describe(config, trainer.objective)}; seed: {config.seed}",
        describe_store(trainer),
        *unused_gpus(ranks),
        f"run directory: {trainer.run}; the same command resumes it",
    ]


def unused_gpus(ranks: Ranks) -> list[str]:
    """A line that says how to use all GPUs of this machine, if a run of one rank leaves some unused."""
    here = torch.cuda.device_count() if ranks.device.type == "cuda" else 0
    if ranks.world_size > 1 or here < 2:
        return []
    return [f"{here} GPUs here, 1 used: --workers {here} uses all of them"]


def describe_store(trainer: Trainer) -> str:
    """Where the x0-state is, or why there is none."""
    kind, objective = trainer.config.store.kind, trainer.config.objective.name
    if trainer.store.keeps_state:
        return f"x0-state store: {kind}, {trainer.config.store.dtype} ({trainer.store.describe()})"
    unused = "" if kind == "none" else f"; store.kind={kind} is not used"
    return f"x0-state store: none, because {objective} does not read the state{unused}"
