"""Ways to guide a consistency model, on one-dimensional data for which everything is known: no network, no sampling.

    python benchmarks/quality/guided_flows.py --json FILE.json

The classes are normal distributions. For one of them, four functions take noise at sigma 80 to samples:

- plain: the probability flow of the class.
- guided flow: that of D + w (D_c - D), where D_c and D are the means of the images of the class and of all images.
- two calls: none + w (plain - none), where none is the end of the flow of all images.
- difference of ends: the flow of D_c + (1 - 1/w) (f - none), where f is its own end.

The table has the mean and the standard deviation of each one's samples, and the share of them whose nearest class is
the class. The flows are integrated with Euler's method over 600 levels, and samples are 4,000 quantiles of the noise.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

Floats = npt.NDArray[np.float64]
PROBLEMS = {
    "-1 and 1, deviation 0.3": ((-1.0, 1.0), 0.3, 1),
    "-0.5 and 0.5, deviation 0.5": ((-0.5, 0.5), 0.5, 1),
    "-1, 0 and 1, deviation 0.4; the second": ((-1.0, 0.0, 1.0), 0.4, 1),
}
"""The means of the classes, the deviation of each, and the class that is sampled."""
LEVELS = np.concatenate([[0.002], np.linspace(0.02 ** (1 / 7), 80 ** (1 / 7), 600) ** 7])


def means(x: Floats, sigma: float, classes: Floats, deviation: float, own: int) -> tuple[Floats, Floats]:
    """D_c and D at `x` [N]."""
    variance = deviation**2 + sigma**2
    each = classes[:, None] + deviation**2 / variance * (x - classes[:, None])
    logits = -((x - classes[:, None]) ** 2) / 2 / variance
    shares = np.exp(logits - logits.max(0))
    return each[own], (shares / shares.sum(0) * each).sum(0)


def ends(classes: Floats, deviation: float, own: int, weight: float) -> dict[str, Floats]:
    """The samples of each function for quantiles of the noise. Levels are climbed, and f is carried along."""
    base = np.linspace(-6, 6, 2001)
    x = base * np.sqrt(1 + LEVELS[0] ** 2)
    plain = none = guided = difference = x
    for before, sigma in itertools.pairwise(LEVELS.tolist()):
        last, x = x, base * np.sqrt(1 + sigma**2)
        mean, every = means(x, sigma, classes, deviation, own)

        def below(of: Floats, toward: Floats) -> Floats:
            """The value of `of` one step down the flow toward `toward`."""
            found: Floats = np.interp(x - (sigma - before) * (x - toward) / sigma, last, of)  # noqa: B023
            return found

        plain, none = below(plain, mean), below(none, every)
        guided = below(guided, every + weight * (mean - every))
        found = below(difference, mean)
        for _ in range(50):  # f is on both sides
            found = below(difference, mean + (1 - 1 / weight) * (found - none))
        difference = found
    noise = 80 * norm.ppf((np.arange(4000) + 0.5) / 4000)
    functions = {"plain": plain, "guided flow": guided, "two calls": none + weight * (plain - none)}
    functions["difference of ends"] = difference
    return {name: np.interp(noise, x, each) for name, each in functions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the table; the same as text is written next to it")
    given, head = parser.parse_args(), about("scipy")
    rows, lines = [], [heading(head), f"{'classes':42}{'w':>3}  {'samples':20}{'mean':>7}{'deviation':>11}{'share':>8}"]
    for name, (classes, deviation, own) in PROBLEMS.items():
        for weight in (2.0, 3.0):
            for kind, samples in ends(np.array(classes), deviation, own, weight).items():
                share = float((np.abs(samples[:, None] - np.array(classes)).argmin(1) == own).mean())
                mean, spread = float(samples.mean()), float(samples.std())
                rows.append(
                    {"classes": name, "w": weight, "samples": kind, "mean": mean, "deviation": spread, "share": share}
                )
                mean = round(mean, 3) + 0.0  # no -0
                lines.append(f"{name:42}{weight:>3g}  {kind:20}{mean:>7.3f}{spread:>11.3f}{share:>8.3f}")
    print("\n".join(lines))
    write_report(given.json, head, {"rows": rows}, lines)


if __name__ == "__main__":
    main()
