"""Is the image negligible at the noise level at which one-step sampling starts? For VE.

    python benchmarks/quality/start_level.py benchmarks/results/fashion-mnist/consistency --sigma 30 50 65 80 100

Sampling starts from pure noise instead of x_0 + sigma eps. The two differ by the mean of the data, |mean| / sigma
standard deviations of the noise along one direction. For each sigma, the table shows this offset and the Frechet
distance at one evaluation from that level. The model was not trained at levels above its sigma_max.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import udddm
from udddm.data import load_dataset
from udddm.diffusion import schedule

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "yardstick"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sigma", type=float, nargs="+", default=[30.0, 50.0, 65.0, 80.0, 100.0])
    parser.add_argument("--features", default="features:fashion_mnist")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = udddm.load_model(arguments.checkpoint, device="cpu")
    dataset = load_dataset(model.config.data)
    mean = np.mean([np.asarray(dataset[i][0], np.float32) / 127.5 - 1 for i in range(len(dataset))], axis=0)
    offset = float(np.linalg.norm(mean))
    rows = []
    print(f"{arguments.checkpoint.name}, trained up to sigma {model.config.schedule.sigma_max:g}")
    print("sigma  |mean|/sigma      fd  precision  recall")
    for sigma in arguments.sigma:
        up_to = schedule.build(model.config.schedule.model_copy(update={"sigma_max": sigma}))
        images = udddm.sample(replace(model, schedule=up_to), range(arguments.count))
        scores = udddm.evaluate(images, dataset, features=arguments.features, device="cpu")
        rows.append({"sigma": sigma, "offset": offset / sigma} | {k: scores[k] for k in ("fd", "precision", "recall")})
        print("{sigma:5g}  {offset:12.2f}  {fd:6.2f}  {precision:9.2f}  {recall:6.2f}".format(**rows[-1]), flush=True)
    if arguments.json:
        found = {"checkpoint": str(arguments.checkpoint), "count": arguments.count, "rows": rows}
        write_json(arguments.json, about(), found)


if __name__ == "__main__":
    main()
