"""The public functions: `train`, `sample`, `load_model`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import udddm
from udddm import posthoc, sampler
from udddm.backends.deepspeed_config import resolve as resolve_deepspeed
from udddm.backends.deepspeed_config import zero_stage
from udddm.backends.ranks import TIMEOUT, Ranks, choose_device
from udddm.checkpoint import NAME, load_config, load_json
from udddm.config import ConfigError, RunConfig
from udddm.data import DataError, ImageDataset, MapDataset, load_dataset
from udddm.errors import CheckpointError, StoreError
from udddm.network import UNet
from udddm.portable import Saved
from udddm.pretrained import checkpoint_files
from udddm.process import Process
from udddm.process import build as build_process
from udddm.progress import say
from udddm.remote_run import open_copy, open_run
from udddm.run import Run, claim
from udddm.store.objects import local_path, open_objects
from udddm.trainer import Listener, Trainer, network_for
from udddm.urls import secret_in


def train(
    config: RunConfig,
    dataset: MapDataset | Callable[[], MapDataset] | None = None,
    *,
    run_dir: str | Path,
    device: str = "auto",
    backend: str = "auto",
    workers: int | tuple[int, int] = 1,
    max_failures: int = 0,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Train, or resume, the run in `run_dir`, a directory or a URL, and return what its `result.json` says.

    `dataset` is any map-style object: `len(dataset)` and `dataset[i]` giving an image [C, H, W] in [-1, 1] (or
    uint8), or an (image, label) pair; or a function that returns one, which is called in every worker. Without it,
    `config.data` is loaded. `backend` is auto, local or ray; `workers` a number or (least, most). After each of
    `max_failures` failures of workers (killed, or `timeout` seconds without an answer) the run goes on from its last
    checkpoint.

    Raises ConfigError, DataError, StoreError, CheckpointError, Diverged, Interrupted, RankError or WorkerLost; nothing
    is lost by any of them, and the same call resumes.
    """
    from udddm.backends import launch

    _refuse_secrets(config, run_dir)
    wanted = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= wanted[0] <= wanted[1]:
        raise ConfigError(f"workers {wanted}: give a positive number, or the least and the most")
    job = launch.Job(config, run_dir, dataset, device, wanted, max_failures, timeout)
    if config.engine.name == "deepspeed":
        world = os.environ.get("WORLD_SIZE")  # another launcher's
        resolve_deepspeed(config, int(world) if world else job.fitting(wanted[1]))
    return launch.run(job, backend)


def _refuse_secrets(config: RunConfig, run_dir: str | Path) -> None:
    """Raise ConfigError for a URL with a secret in it, before it is written into run.json and every checkpoint."""
    urls = {
        "the run directory": str(run_dir),
        "store.url": config.store.url,
        "data.path": config.data.path,
        "train.initial": config.train.initial,
    }
    for key, url in urls.items():
        if url is not None and (what := secret_in(url)):
            raise ConfigError(
                f"{key}: leave the {what} out of the URL, which is written into run.json and every checkpoint. Give "
                "credentials by the environment or by fsspec's configuration files, or copy the files to a local disk"
            )


def train_rank(
    config: RunConfig, dataset: MapDataset | None, where: str | Path, ranks: Ranks, listener: Listener | None = None
) -> dict[str, Any]:
    """This rank's part of a run: what every launcher calls on every rank once they have joined."""
    refused = (ConfigError, DataError, StoreError, CheckpointError, OSError)
    run = ranks.together(lambda: open_run(where), refused)

    def load() -> ImageDataset:
        images = ImageDataset(dataset if dataset is not None else load_dataset(config.data))
        if config.network.classes and not images.labelled:
            raise ConfigError("network.classes is set, but the data set has no labels")
        return images

    images = ranks.together(load, refused)
    with ExitStack() as held:

        def take() -> None:
            held.enter_context(run.held())
            run.fetch()
            claim(run.path, config, images)
            run.push()

        ranks.first_only(take, refused)
        held.callback(run.leave)
        ranks.together(lambda: run.share(ranks), refused)
        if config.store.kind == "zarr" and config.store.url:
            url = config.store.url
            directory = local_path(url)
            if directory is not None:
                ranks.check_shared(directory, "the x0-state's directory")
            else:  # every rank must get there, with its machine's credentials
                ranks.together(lambda: open_objects(url).exists("zarr.json"), refused)
        return _train(config, images, run, ranks, listener)


def _train(
    config: RunConfig, images: ImageDataset, run: Run, ranks: Ranks, listener: Listener | None
) -> dict[str, Any]:
    def finished() -> dict[str, Any] | None:
        path = run.path / "result.json"
        return load_json(path) if path.exists() else None

    result = ranks.first_only(finished, (CheckpointError,))
    if result is not None:
        if ranks.first:
            say(f"{run} is finished; its result is in {run}/result.json")
        return result
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if ranks.first:
        for line in describe(config, images, run, ranks):
            say(line)
    return Trainer(config, images, run, ranks, listener).train()


def describe(config: RunConfig, images: ImageDataset, run: Run, ranks: Ranks) -> list[str]:
    """The first lines of a run: what runs where, and why."""
    device = ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    reasons = {
        "gpu": "a tensor on the training device" if device.type == "cuda" else "no GPU here: a tensor in host memory",
        "pinned": "host memory, copied in the background",
        "zarr": f"{config.store.url or run.state}, read and written in the background",
    }
    precision = "as configured" if config.train.precision != "fp32" else "the default"
    engine: str = config.engine.name
    if engine == "deepspeed":
        engine += f", ZeRO {zero_stage(config)}" + (", optimizer in host memory" if config.engine.offload else "")
    return [
        f"udddm {udddm.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"device: {name}, {ranks.world} {'ranks' if ranks.world > 1 else 'rank'}; engine: {engine}; "
        f"precision: {config.train.precision} ({precision})",
        f"data: {len(images)} images {'x'.join(map(str, images.shape))}; objective: {config.objective_in_words}; "
        f"seed: {config.seed}",
        f"x0-state store: {config.store.kind}, {config.store.dtype} ({reasons[config.store.kind]})",
        f"run directory: {run}; the same command resumes it",
    ]


@dataclass
class Model:
    """A trained model: `denoiser` weights in evaluation mode, with what sampling needs to know."""

    network: UNet
    process: Process
    config: RunConfig
    shape: tuple[int, int, int]


def load_model(
    checkpoint: str | Path,
    *,
    ema: float | str | None = None,
    ema_length: float | None = None,
    device: str | torch.device = "auto",
) -> Model:
    """The model of a run or checkpoint.

    `ema`: a decay that the run kept, "power-<length>", "none" for the raw weights, None for the first average.
    `ema_length`: of a run (not of one checkpoint), the average of this relative length, made of its stored ones.
    `device`: auto, cpu, cuda (the first one), or the device itself.

    Raises CheckpointError for a checkpoint that is damaged, of another network, or without that average.
    """
    if ema is not None and ema_length is not None:
        raise ConfigError("ema names an average that the run kept, ema_length makes another: give one of them")
    with checkpoint_files(checkpoint, ("config",) if ema_length is not None else ("config", "model", "ema")) as path:
        config, shape = load_config(path)
        network = network_for(config, shape)
        parameters = dict(network.named_parameters())
        shapes = {name: p.shape for name, p in parameters.items()}
        weights: Mapping[str, torch.Tensor]
        if ema_length is not None:
            weights = posthoc.average(_run_of(checkpoint), ema_length, shapes)
        else:
            weights = kept = Saved.average(path, config.train.averages, ema)
            kept.check_network(shapes)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
                if not parameter.isfinite().all():
                    raise CheckpointError(
                        f"{checkpoint}: the weights of {name} are not all finite; use another checkpoint"
                    )
    network.to(device if isinstance(device, torch.device) else choose_device(device)).eval()
    return Model(network, build_process(config.process), config, shape)


def _run_of(where: str | Path) -> Run:
    """The run itself, to choose the length of an average in."""
    local = local_path(where)
    name = local.resolve().name if local is not None else str(where).rstrip("/").rpartition("/")[2]
    if NAME.fullmatch(name) or (local is not None and (local / "config.json").exists()):
        raise CheckpointError(
            f"{where} is one checkpoint: the length of an average is chosen from all that a run stored; give the run"
        )
    return open_copy(where)


def default_labels(config: RunConfig, seeds: Sequence[int]) -> list[int] | None:
    """The class of each seed where none is asked for: the classes in turn."""
    classes = config.network.classes
    return [seed % classes for seed in seeds] if classes else None


def sample(
    model: Model | str | Path,
    seeds: Sequence[int],
    *,
    steps: int = 1,
    sampler_name: sampler.SamplerName = "renoise",
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    batch: int = 250,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Images [len(seeds), C, H, W], float32 in [-1, 1], by `steps` network evaluations each.

    Each depends on its seed (and label) alone; a model with classes and no `labels` takes `seed % classes`.
    `guidance` other than 1 weighs the labels (docs/method.md), with two calls of the network an evaluation; ConfigError
    for a model that was not trained for it. `model` is a `Model` or the path of a run or checkpoint.
    """
    loaded = model if isinstance(model, Model) else load_model(model)
    loaded.config.check_guidance(guidance, "guidance")
    device = next(loaded.network.parameters()).device
    drawn = sampler.batches(
        loaded.network,
        loaded.process,
        loaded.shape,
        list(seeds),
        batch=batch,
        steps=steps,
        sampler=sampler_name,
        labels=default_labels(loaded.config, seeds) if labels is None else list(labels),
        guidance=guidance,
        device=device,
    )
    images: np.ndarray[Any, np.dtype[np.float32]] = torch.cat(list(drawn)).clamp(-1, 1).numpy()
    return images
