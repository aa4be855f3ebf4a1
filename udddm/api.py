"""The public functions: `train`, `sample`, `load_model`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from udddm.backends.distributed.ranks import TIMEOUT, choose_device
from udddm.backends.engines.deepspeed_config import resolve as resolve_deepspeed
from udddm.config import RunConfig
from udddm.data import MapDataset
from udddm.diffusion import samplers
from udddm.diffusion.schedule import NoiseSchedule
from udddm.diffusion.schedule import build as build_process
from udddm.errors import CheckpointError, ConfigError
from udddm.networks import UNet
from udddm.runs import posthoc_ema
from udddm.runs.checkpoint import NAME, load_config
from udddm.runs.pretrained import checkpoint_files
from udddm.runs.remote import open_copy
from udddm.runs.run import Run
from udddm.runs.weights import Saved
from udddm.storage.base import local_path
from udddm.training.trainer import build_network_of
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
    from udddm.backends.launchers import base

    _refuse_secrets(config, run_dir)
    wanted = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= wanted[0] <= wanted[1]:
        raise ConfigError(f"workers {wanted}: give a positive number, or the least and the most")
    job = base.Job(config, run_dir, dataset, device, wanted, max_failures, timeout)
    if config.engine.name == "deepspeed":
        world = os.environ.get("WORLD_SIZE")  # another launcher's
        resolve_deepspeed(config, int(world) if world else job.resolve_num_workers(wanted[1]))
    return base.run(job, backend)


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


@dataclass
class Model:
    """A trained model: `denoiser` weights in evaluation mode, with what sampling needs to know."""

    network: UNet
    process: NoiseSchedule
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
        network = build_network_of(config, shape)
        parameters = dict(network.named_parameters())
        shapes = {name: p.shape for name, p in parameters.items()}
        weights: Mapping[str, torch.Tensor]
        if ema_length is not None:
            weights = posthoc_ema.average(_run_of(checkpoint), ema_length, shapes)
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
    return Model(network, build_process(config.schedule), config, shape)


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
    sampler_name: samplers.SamplerName = "renoise",
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
    drawn = samplers.batches(
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
