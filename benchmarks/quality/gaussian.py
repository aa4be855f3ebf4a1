"""Gaussian data, for which the exact solution is known: trained f compared with f*, for each level, for VP and VE.

    python benchmarks/quality/gaussian.py --json benchmarks/results/gaussian.json --plot benchmarks/results/gaussian.png

For x_0 ~ N(m, s^2 I) the probability-flow ODE through x_t = alpha x_0 + sigma eps is solved in closed form:

    f*(x_t, t) = m + (x_t - alpha m) s / sqrt(alpha^2 s^2 + sigma^2)

(VE: alpha = 1. Both x_t and f* keep their standard score along the ODE, and at t = 0 the score is that of x_0.)
Noise schedule, objective, noise, order, x0-state store, optimizer and EMA are those of a training run; the network is
a small MLP, so that a run takes minutes on one core. The error of a level is RMS(f - f*) / s on new data and noise, in
percent.

Two effects keep the error above 0 for any length of training. (1) The fixed point of a chain of M levels is not f*:
level k learns E[f_(k-1)(x_(k-1)) | x_k], which for Gaussian data is m + (x_k - m) g_k (VE) with g_k = prod_(j <= k)
(s^2 + sigma_(j-1) sigma_j) / (s^2 + sigma_j^2), where sigma_(-1) = 0. Its distance from f* decreases as 1/M, and is the
column `bias`. (2) The noise of the optimizer, which learning rate decay, EMA and the constant c of the pseudo-Huber
norm reduce. With c far above the error, the gradient decreases with the error; with c far below, it does not. The norm
adds no bias: its minimizer is the mean in the first case and the spatial median in the second, and for Gaussian data,
for which the target given x_k is symmetric about its mean, both are the same point.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from udddm import objectives, rng, store
from udddm.backends import engines
from udddm.backends.distributed.ranks import Ranks
from udddm.config import (
    ChainConfig,
    NetworkConfig,
    ObjectiveConfig,
    OrderConfig,
    RunConfig,
    ScheduleConfig,
    Stage,
    StoreConfig,
    TrainConfig,
)
from udddm.diffusion import schedule
from udddm.diffusion.denoise import add_noise, denoise
from udddm.diffusion.schedule import Array, Coefficients, NoiseSchedule
from udddm.ema import EMA
from udddm.networks.blocks import NoiseEmbedding
from udddm.order import Order
from udddm.rng import Stream
from udddm.runs.run import Run
from udddm.store.encoding import Encoding
from udddm.store.layout import StateLayout

sys.path.insert(0, str(Path(__file__).parents[1]))
import plots
from report import about, write_json

Kind = Literal["ve", "vp"]
ObjectiveName = Literal["chain", "uddm"]

SHAPE = (1, 2, 2)
SPREAD = 0.5
MEAN = torch.tensor([[[0.4, -0.2], [0.0, 0.7]]])
TIMESTEPS: dict[Kind, int] = {"ve": 1000, "vp": 8000}
TEST_SEED = 1_000_003


class MLP(nn.Module):
    """F as an MLP on 2 x 2 pixels. A condition, if any, is concatenated with the input."""

    def __init__(self, width: int, conditioned: bool, max_frequency: float):
        super().__init__()
        pixels = int(np.prod(SHAPE))
        self.conditioned = conditioned
        self.embedding = NoiseEmbedding(32, 2 * width, max_frequency)
        self.first = nn.Linear(2 * pixels if conditioned else pixels, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, pixels)

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, condition: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """x [B, C, H, W], level [B], condition [B, C, H, W] or None -> [B, C, H, W]."""
        inputs = x.flatten(1)
        if self.conditioned:
            assert condition is not None
            inputs = torch.cat([inputs, condition.flatten(1)], 1)
        scale, shift = self.embedding(level).chunk(2, 1)
        hidden = F.silu(self.first(inputs) * (1 + scale) + shift)
        hidden = hidden + F.silu(self.second(hidden))
        output: torch.Tensor = self.last(hidden)
        return output.view(x.shape)


def gaussian_images(seed: int, ids: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
    """x_0 ~ N(m, s^2 I) of samples `ids`, [B, 1, 2, 2]."""
    return MEAN + SPREAD * rng.normal(rng.as_tensor(rng.keys(seed, Stream.INITIAL_WEIGHTS, ids)), SHAPE)


def exact(xt: torch.Tensor, at: Coefficients) -> torch.Tensor:
    """f*(x_t, t), [B, 1, 2, 2]."""
    alpha, sigma = at.alpha[:, None, None, None], at.sigma[:, None, None, None]
    return MEAN + (xt - alpha * MEAN) * SPREAD / torch.hypot(alpha * SPREAD, sigma)


def bias(sigma: Array) -> Array:
    """RMS(f - f*) / s of the fixed point of the chain, on levels with noise-to-signal ratios `sigma` [M + 1]."""
    variance = SPREAD**2
    below = np.concatenate([[0.0], sigma[:-1]])
    factors = (variance + below * sigma) / (variance + sigma**2)
    distance: Array = np.abs(np.cumprod(factors) * np.hypot(SPREAD, sigma) / SPREAD - 1)
    return distance


def configure(kind: Kind, name: ObjectiveName, settings: argparse.Namespace) -> RunConfig:
    """The number of levels doubles up to `settings.levels`; the last doubling is in the middle of the run."""
    levels = [settings.levels >> i for i in (3, 2, 1, 0)]
    stages = tuple(Stage(start=s, levels=m) for s, m in zip((0, 0.1, 0.25, 0.5), levels, strict=True))
    return RunConfig(
        seed=settings.seed,
        schedule=ScheduleConfig(kind=kind, timesteps=TIMESTEPS[kind]),
        network=NetworkConfig(condition="cross-attention" if name == "uddm" else "none"),
        objective=ObjectiveConfig(name=name, huber_c=settings.huber_c, chain=ChainConfig(length=2, stages=stages)),
        order=OrderConfig(lanes=1, chunk=4096, window=settings.samples // 4096),
        store=StoreConfig(kind="gpu", dtype="fp32"),
        train=TrainConfig(
            steps=settings.steps,
            batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            betas=(0.9, 0.99),
            warmup_steps=200,
            lr_schedule="cosine",
            ema=(settings.ema,),
            ema_warmup=True,
            channels_last=False,
        ),
    )


@dataclass
class Trained:
    network: MLP
    schedule: NoiseSchedule
    seconds: float
    """CPU seconds of one core; training uses only one."""


def train(config: RunConfig, samples: int, width: int) -> Trained:
    """Train this network with the order, store, objective, engine and EMA of the package."""
    chosen = schedule.build(config.schedule)
    conditioned = config.network.condition != "none"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = MLP(width, conditioned, chosen.max_frequency)
        average = MLP(width, conditioned, chosen.max_frequency)
    ranks = Ranks(0, 1, torch.device("cpu"))
    images = gaussian_images(config.seed, np.arange(samples))
    order = Order.build(config.order, config.seed, samples, config.train.batch_size, SHAPE)
    lanes = order.lanes_of(0, 1)
    assert config.train.steps is not None
    goal = objectives.build(config, chosen, config.train.steps / order.steps_per_epoch, (1, 2, 2))
    engine = engines.build(network, config, ranks, config.train.steps)
    teacher = objectives.teacher_of(config, engine)
    ema = EMA(engine.weights(), config.train.ema[0], config.train.ema_warmup)
    states = store.build(
        Run(Path()).store_context(
            StateLayout(order, lanes, SHAPE, Encoding(config.store.dtype), ranks.device), config.store
        )
    )
    states.start(0, 0, None)
    started = time.process_time()
    for step in range(config.train.steps):
        epoch, place = divmod(step, order.steps_per_epoch)
        batch = order.batch_of(lanes, epoch, place)
        visits = goal.plan(batch.ids, epoch)
        losses, state = objectives.visit_loss(network, images[batch.ids], states.read(), visits, None, teacher)
        engine.backward_and_step((losses * torch.from_numpy(batch.weights)).sum() / batch.total, step)
        ema.update(step + 1)
        states.write(state)
    states.close()
    average.load_state_dict(ema.weights)
    return Trained(average.eval(), chosen, time.process_time() - started)


def errors(trained: Trained, times: Array, count: int = 4096) -> Array:
    """RMS(f - f*) / s at each of `times`, on new data, noise and conditions."""
    return errors_and_slopes(trained, times, count)[0]


@torch.no_grad()
def errors_and_slopes(trained: Trained, times: Array, count: int = 4096) -> tuple[Array, Array]:
    """RMS(f - f*) / s, and the least-squares slope of f - m over f* - m, at each of `times`, as `errors`."""
    ids = np.arange(count)
    x0 = gaussian_images(TEST_SEED, ids)
    found, slopes = [], []
    for index, t in enumerate(times):
        at = Coefficients(*torch.from_numpy(trained.schedule.coefficients(np.full(count, t))))
        eps, condition = (
            rng.normal(rng.as_tensor(rng.keys(TEST_SEED, stream, ids, index)), SHAPE)
            for stream in (Stream.NOISE, Stream.CONDITION)
        )
        xt = add_noise(x0, eps, at)
        f, best = denoise(trained.network, xt, at, condition, None), exact(xt, at)
        found.append(float((f - best).square().mean().sqrt()) / SPREAD)
        slopes.append(float(((f - MEAN) * (best - MEAN)).sum() / (best - MEAN).square().sum()))
    return np.array(found), np.array(slopes)


def run(kind: Kind, settings: argparse.Namespace) -> dict[str, Any]:
    """Results of one schedule: the chain objective, and Algorithm 1 if requested."""
    trained = train(configure(kind, "chain", settings), settings.samples, settings.width)
    times = trained.schedule.levels(settings.levels)
    sigma = trained.schedule.sigma(times)
    found = errors(trained, times)
    result: dict[str, Any] = {
        "t": times.tolist(),
        "sigma": sigma.tolist(),
        "bias": bias(sigma).tolist(),
        "chain": found.tolist(),
        "chain_mean": float(found.mean()),
        "bias_mean": float(bias(sigma).mean()),
        "chain_seconds": trained.seconds,
    }
    if settings.algorithm_1_steps:
        shorter = argparse.Namespace(**vars(settings) | {"steps": settings.algorithm_1_steps})
        other = train(configure(kind, "uddm", shorter), settings.samples, settings.width)
        found = errors(other, times)
        result |= {
            "algorithm_1": found.tolist(),
            "algorithm_1_mean": float(found.mean()),
            "algorithm_1_seconds": other.seconds,
        }
    return result


def table(results: dict[str, dict[str, Any]], rows: int = 17) -> str:
    """Table of errors in percent of s at evenly spaced levels. The means are over all levels."""
    lines = [
        "RMS(f - f*) / s, percent; in parentheses, seconds on one core",
        f"{'':<8}{'level':>6}{'sigma':>11}{'chain':>8}{'bias':>8}{'Algorithm 1':>13}",
    ]
    for kind, result in results.items():
        count = len(result["t"])
        for k in np.unique(np.linspace(0, count - 1, rows).round().astype(int)):
            other = f"{100 * result['algorithm_1'][k]:13.1f}" if "algorithm_1" in result else ""
            lines.append(
                f"{kind:<8}{k:>6}{result['sigma'][k]:>11.3g}{100 * result['chain'][k]:8.2f}"
                f"{100 * result['bias'][k]:8.2f}{other}"
            )
        other = f"{100 * result['algorithm_1_mean']:13.1f}" if "algorithm_1" in result else ""
        mean, expected = 100 * result["chain_mean"], 100 * result["bias_mean"]
        lines.append(
            f"{kind:<8}{'mean':>6}{'':>11}{mean:8.2f}{expected:8.2f}{other}   ({result['chain_seconds']:.0f} s)"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description="Compare trained f with the exact f* on Gaussian data.")
    options.add_argument("--schedule", nargs="+", choices=["ve", "vp"], default=["ve", "vp"])
    options.add_argument("--steps", type=int, default=36_000)
    options.add_argument("--algorithm-1-steps", type=int, default=3_000, help="0 omits Algorithm 1")
    options.add_argument("--levels", type=int, default=128, help="M of the last stage; a multiple of 8")
    options.add_argument("--samples", type=int, default=65_536, help="a multiple of 4096")
    options.add_argument("--batch", type=int, default=512)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--learning-rate", type=float, default=2e-3)
    options.add_argument("--huber-c", type=float, default=0.5)
    options.add_argument("--ema", type=float, default=0.999)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=Path, help="write settings and results to this file")
    options.add_argument("--plot", type=Path, help="write a figure to this file")
    return options


def main() -> None:
    settings = parser().parse_args()
    torch.set_num_threads(1)
    results = {kind: run(kind, settings) for kind in settings.schedule}
    print(table(results))
    if settings.json:
        used = {k: v for k, v in vars(settings).items() if k not in ("json", "plot", "schedule")}
        record = {"settings": used | {"mean": MEAN.tolist(), "spread": SPREAD}, "results": results}
        write_json(settings.json, about(), record)
    if settings.plot:
        plots.gaussian(results, settings.plot)


if __name__ == "__main__":
    main()
