"""P9: scores that are made in a thread while training runs."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch

from gpu_steps.harness import Bench, Check
from gpu_steps.workloads import Shape, alone, device_of, environment, pixels, running, synchronize, timed, tiny
from udddm.config import EvaluateConfig
from udddm.evaluation.background import BackgroundEvaluation

SHAPE: Shape = (3, 32, 32)


@cache
def projection(device: torch.device) -> torch.nn.Module:
    """A small feature network with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 5, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 5, stride=2),
            torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
        )  # fmt: skip
    return layers.to(device).eval()


def features(images: torch.Tensor) -> Any:
    """For `evaluate.features`."""
    return projection(images.device)(images)


def scoring(bench: Bench) -> None:
    """Training goes on beside it, and the scores are those that the same pictures get alone."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    ranks, dataset = alone(bench), pixels(bench.pick(4096, 256), SHAPE)
    images = torch.rand(bench.pick(4096, 256), *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    chosen = EvaluateConfig(every_steps=1, count=2, features="gpu_steps.beside:features")
    environment(XDG_CACHE_HOME=str(bench.scratch / "cache"))
    scores: dict[str, dict[str, Any]] = {}
    for name in ("alone", "beside"):
        place = bench.scratch / name
        place.mkdir()
        background = BackgroundEvaluation(chosen, dataset, device_of(bench), place)
        if name == "alone":
            background.submit(1, images, 1)
        else:
            bench.report(**beside_training(bench, background, images))
        assert background.wait(600)
        background.cancel()
        scores[name] = json.loads((place / "evaluation.jsonl").read_text().splitlines()[-1])
    synchronize(ranks.device)
    figures = {key: [scores["alone"][key], scores["beside"][key]] for key in ("fd", "kid", "recall", "precision")}
    bench.report(alone_and_beside=figures)
    for key, (first, second) in figures.items():
        assert abs(first - second) <= 1e-4 * max(1.0, abs(first)), f"{key}: {first} alone, {second} beside training"


def beside_training(bench: Bench, background: BackgroundEvaluation, images: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of a step without and with a score under way."""
    config = tiny(
        f"network.base_channels={bench.pick(64, 32)}",
        "network.attention_resolutions=[16]",
        f"train.batch_size={bench.pick(64, 8)}",
    )
    ranks, count = alone(bench), bench.pick(100, 5)
    with running(config, pixels(512, SHAPE), bench.scratch / "run", ranks) as (trainer, inputs):
        before = timed(lambda: trainer.train_step(inputs), ranks.device, warm=3, count=count)
        background.submit(1, images, 1)
        during = timed(lambda: trainer.train_step(inputs), ranks.device, warm=0, count=count)
        loss = float(trainer.train_step(inputs))
        assert loss == loss, "the loss is not a number"
        return {"step_ms_without": round(before.device_ms, 3), "step_ms_with": round(during.device_ms, 3)}


CHECKS = (Check("P9", "scoring", 20, scoring),)
