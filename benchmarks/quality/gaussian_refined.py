"""Refined pairs on Gaussian data: the error of the trained f for each level, and their bias in closed form.

    python benchmarks/quality/gaussian_refined.py --json benchmarks/results/gaussian-refined.json

The data, the exact f* and the network are those of gaussian.py, with the VE schedule. The objective is ict with levels
drawn uniformly and iCT's loss weights, after a denoiser, with and without refined pairs (half of the visits above sigma
0.8, L = 2). With 16 levels, the error of iCT itself is 14 % of s (its `theory`), and 1,500 steps come near that.

Without loss weights, refined pairs diverged (`--weighting none --levels 32 --steps 2500 --seeds 0`).

The fixed point of refined pairs is not f*. Let x = m + u be the input at level sigma, V = s^2 + sigma^2, and f(x) =
m + g u. A visit of the image has u = (x_0 - m) + sigma eps; a refined one has u' = g u + sigma eps with the same eps,
which is correlated with b = m + g u, because u contains it: Cov(g u, eps) = g sigma. Its variance at the level itself
is therefore g^2 V + 2 g sigma^2 + sigma^2 instead of V. With a share p of refined visits, the squared error of a linear
f is least at (r is the level below and h its g, the teacher)

    g = h ((1 - p) (s^2 + r sigma) + p (g^2 V + g sigma (r + sigma) + r sigma)) /
          ((1 - p) V + p (g^2 V + 2 g sigma^2 + sigma^2))

For p = 0 this is the recursion of gaussian.py. With infinitely many levels, and g near its exact value s / sqrt(V), the
right side changes by d ln g / d sigma = -sigma (1 + p g) / (V + 2 p g sigma^2), where the exact solution has -sigma/V.
The difference is p g sigma (sigma^2 - s^2) / (V (V + 2 p g sigma^2)), which is positive above sigma = s, and about
p s / sigma^2 far above. It adds up over the levels to p s / above at most: f is too steep, and samples are too varied.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gaussian
import numpy as np
import torch

from udddm.config import ICTConfig, ObjectiveConfig, RefinedConfig, RunConfig
from udddm.diffusion import schedule
from udddm.diffusion.schedule import Array

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_json

ARMS = {"ict": 0.0, "ict-refined": 0.5}
"""The share of refined visits above `settings.above`."""


def fixed_point(sigma: Array, share: float, above: float) -> Array:
    """g sqrt(V) / s - 1 on levels `sigma` [M]: the relative error of a linear f, with a share of refined visits."""
    variance, g, r, found = gaussian.SPREAD**2, 1.0, 0.0, []
    for level in sigma:
        p = share if level > above else 0.0
        total, teacher = variance + level**2, g
        for _ in range(200):  # g is on both sides; each pass reduces the difference to the solution
            refined = g * g * total + g * level * (r + level) + r * level
            spread = g * g * total + 2 * g * level**2 + level**2
            g = teacher * ((1 - p) * (variance + r * level) + p * refined) / ((1 - p) * total + p * spread)
        r = float(level)
        found.append(g * np.sqrt(total / variance) - 1)
    return np.array(found)


def configure(share: float, settings: argparse.Namespace) -> RunConfig:
    """The run of gaussian.py with ict and a constant number of levels, which a short run can converge at."""
    base = gaussian.configure("ve", "chain", settings)
    ict = ICTConfig(s0=settings.levels, s1=settings.levels, distribution="uniform", weighting=settings.weighting)
    refined = RefinedConfig(share=share, above=settings.above)
    objective = ObjectiveConfig(name="ict", huber_c=settings.huber_c, pretrain=0.2, ict=ict, refined=refined)
    return base.model_copy(update={"objective": objective})


def run(share: float, settings: argparse.Namespace, times: Array) -> dict[str, Any]:
    """Errors of one run: RMS(f - f*) / s and the slope of f relative to that of f*, minus 1, at each of `times`."""
    trained = gaussian.train(configure(share, settings), settings.samples, settings.width)
    errors, steepness = gaussian.errors_and_slopes(trained, times)
    return {"errors": errors.tolist(), "slopes": (steepness - 1).tolist(), "seconds": trained.seconds}


def table(sigma: Array, expected: dict[str, Array], rows: dict[str, list[dict[str, Any]]], count: int = 15) -> str:
    """Errors in percent of s at evenly spaced levels, as mean and range over the seeds."""
    lines = [f"{'sigma':>8}" + "".join(f"{f'{arm}: error':>24}{'slope':>9}{'theory':>9}" for arm in rows)]
    for k in np.unique(np.linspace(0, len(sigma) - 1, count).round().astype(int)):
        line = f"{sigma[k]:8.3g}"
        for arm, runs in rows.items():
            errors, slopes = ([100 * each[what][k] for each in runs] for what in ("errors", "slopes"))
            text = f"{np.mean(errors):.1f} [{min(errors):.1f}, {max(errors):.1f}]"
            line += f"{text:>24}{np.mean(slopes):+9.1f}{100 * expected[arm][k]:+9.1f}"
        lines.append(line)
    seconds = max(each["seconds"] for runs in rows.values() for each in runs)
    return "\n".join([*lines, f"errors and slopes in percent; at most {seconds:.0f} CPU seconds per run"])


def parser() -> argparse.ArgumentParser:
    options = gaussian.parser()
    options.description = "Refined pairs on Gaussian data, compared with the exact f* and with their fixed point."
    options.set_defaults(steps=1_500, levels=16, samples=16_384, batch=256)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options.add_argument("--weighting", choices=["none", "gap"], default="gap", help="objective.ict.weighting")
    options.add_argument("--above", type=float, default=0.8, help="sigma above which visits are refined")
    return options


def main() -> None:
    settings = parser().parse_args()
    torch.set_num_threads(1)
    chosen = schedule.build(gaussian.configure("ve", "chain", settings).schedule)
    times = chosen.levels(settings.levels)[1:]  # f is not trained at the lowest level, whose image is its own estimate
    sigma = chosen.sigma(times)
    expected = {arm: fixed_point(sigma, share, settings.above) for arm, share in ARMS.items()}
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in settings.arms}
    for seed in settings.seeds:
        for arm in settings.arms:
            settings.seed = seed
            rows[arm].append({"seed": seed, **run(ARMS[arm], settings, times)})
            errors = 100 * np.array(rows[arm][-1]["errors"])
            print(f"seed {seed}, {arm}: error {errors.mean():.2f} %, at most {errors.max():.2f} %", flush=True)
    text = table(sigma, expected, rows)
    print(text)
    if settings.json:
        kept = ("steps", "levels", "samples", "batch", "width", "learning_rate", "huber_c", "ema", "above", "weighting")
        theory = {arm: each.tolist() for arm, each in expected.items()}
        used = {key: getattr(settings, key) for key in kept}
        write_json(settings.json, about(), {"settings": used, "sigma": sigma.tolist(), "theory": theory, "runs": rows})
        settings.json.with_suffix(".txt").write_text(f"{heading(about())}\n{text}\n")


if __name__ == "__main__":
    main()
