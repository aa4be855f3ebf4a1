"""Export models to every format, and compare the images of each with PyTorch's, and the time of a grid in a browser.

    python benchmarks/tools/export.py benchmarks/results/fashion-mnist/consistency runs/digits-classes

A model is a run or a release. The page is measured if there is Chromium and the environment variable
UDDDM_ONNXRUNTIME_WEB, or --runtime, names the folder of the npm package onnxruntime-web (docs/export.md).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from udddm.runs.model import Model, load_model
from udddm.testing.browser import CHROMIUM, run_page
from udddm.tools import export
from udddm.tools.export.generator import Generator

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

COUNT = 256
"""Images that are compared."""
CLICKS = 5
"""Grids that the page draws. Their median and the fastest are reported, because other programs slow down a grid."""
SCRIPT = """
const seconds = [];
let values = null;
const click = () => setTimeout(() => document.querySelector("button").click(), 50);
document.addEventListener("ready", click);
document.addEventListener("drawn", (event) => {
  values = values || [...event.detail.values];
  seconds.push(event.detail.seconds);
  seconds.length < CLICKS ? click() : report({ seconds, values });
});
"""
Images = npt.NDArray[np.float32]


def onnx_images(model: Model, folder: Path) -> Images:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    given = Generator(model).example(model, range(COUNT))
    images: Images = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
    return images


def diffusers_images(model: Model, folder: Path) -> Images:
    from diffusers import DiffusionPipeline

    del model
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images: Images = pipe(seeds=range(COUNT), output_type="pt").images.numpy()
    return images


def release_images(model: Model, folder: Path) -> Images:
    del model
    return load_model(folder, device="cpu").sample(range(COUNT))


FORMATS = (
    ("safetensors", "safetensors", export.Options(), release_images),
    ("ONNX fp32", "onnx", export.Options(), onnx_images),
    ("ONNX fp16", "onnx", export.Options(precision="fp16"), onnx_images),
    ("diffusers", "diffusers", export.Options(), diffusers_images),
)


def measure(run: str, runtime: Path | None, screenshot: Path | None) -> list[dict[str, Any]]:
    """A row for each format of one model."""
    model = load_model(run, device="cpu")
    expected = model.sample(range(COUNT))
    name = Path(run).name if Path(run).parent.name == "runs" else "/".join(Path(run).parts[-2:])
    rows: list[dict[str, Any]] = []

    def row(kind: str, folder: Path, images: Images, seconds: Sequence[float] = ()) -> None:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        largest = float(np.abs(images - expected[: len(images)]).max())
        found = {"model": name, "format": kind, "megabytes": size / 1e6, "images": len(images)}
        rows.append({**found, "largest_difference": largest, "seconds": list(seconds)})

    with tempfile.TemporaryDirectory() as place:
        for kind, to, options, images in FORMATS:
            folder = Path(place) / kind
            export.write(run, folder, to, options)
            row(kind, folder, images(model, folder))
        if runtime is not None and CHROMIUM is not None:
            folder = Path(place) / "page"
            export.write(run, folder, "web", export.Options(runtime=runtime))
            found, console = run_page(folder, SCRIPT.replace("CLICKS", str(CLICKS)), screenshot=screenshot, wait=240)
            if not found or "values" not in found:
                raise SystemExit(f"the page did not draw: {found} {console}")
            drawn = np.array(found["values"], np.float32).reshape(-1, *model.shape)
            row("page in Chromium", folder, drawn, found["seconds"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="RUN")
    parser.add_argument("--runtime", type=Path, default=os.environ.get("UDDDM_ONNXRUNTIME_WEB"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="a picture of the first model's page")
    arguments = parser.parse_args()
    head = about("onnx", "onnxruntime", "onnxscript", "diffusers")
    lines = [heading(head)]
    line = "{:28} {:18} {:>6} {:>8} {:>12} {:>10} {:>9}"
    lines.append(line.format("model", "format", "MB", "images", "difference", "median s", "fastest s"))
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(arguments.models):
        runtime = None if arguments.runtime is None else Path(arguments.runtime)
        rows += measure(run, runtime, arguments.screenshot if number == 0 else None)
    for row in rows:
        size, largest = f"{row['megabytes']:.1f}", f"{row['largest_difference']:.1e}"
        times = [f"{how(row['seconds']):.2f}" if row["seconds"] else "" for how in (statistics.median, min)]
        lines.append(line.format(row["model"], row["format"], size, row["images"], largest, *times).rstrip())
    print("\n".join(lines))
    write_report(arguments.json, head, {"rows": rows}, lines)


if __name__ == "__main__":
    main()
