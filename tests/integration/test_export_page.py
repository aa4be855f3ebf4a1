"""The page of `udddm export --to web` in a browser. It needs Chromium, and onnxruntime-web in UDDDM_ONNXRUNTIME_WEB:

npm pack onnxruntime-web@1.30.0 && tar xf onnxruntime-web-1.30.0.tgz && export UDDDM_ONNXRUNTIME_WEB=$PWD/package
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udddm.runs.model import load_model
from udddm.testing.browser import CHROMIUM, run_page
from udddm.testing.models import random_model, saved
from udddm.tools import export
from udddm.tools.export import web

pytest.importorskip("onnxruntime")
PACKAGE = os.environ.get("UDDDM_ONNXRUNTIME_WEB", "")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.skipif(not PACKAGE, reason="UDDDM_ONNXRUNTIME_WEB does not name the npm package onnxruntime-web"),
]
CLICK = """
const status = () => document.querySelector("[role=status]").textContent;
document.addEventListener("ready", () => {
  document.querySelector("input").value = SEED;
  document.querySelector("select").value = "LABEL";
  document.querySelector("button").click();
});
document.addEventListener("drawn", (event) => {
  const canvas = document.querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(1, 1, 6, 8);
  report({ ...event.detail, values: [...event.detail.values], first: [...data], status: status() });
});
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of a model of color images with ten classes."""
    network = "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: []"
    made = random_model(f"{network}, condition: none, dropout: 0, classes: 10}}", shape=(3, 8, 6))
    return saved(made, tmp_path_factory.mktemp("page") / "model")


@pytest.fixture(scope="module")
def page(model: Path) -> Path:
    out = model.parent / "page"
    export.write(model, out, "web", export.Options(runtime=Path(PACKAGE)))
    return out


def opened(page: Path, seed: int, label: str) -> dict[str, Any]:
    found, console = run_page(page, CLICK.replace("SEED", str(seed)).replace("LABEL", label))
    assert console == [] and found is not None and "values" in found, (found, console)
    return dict(found)


@pytest.mark.parametrize(("seed", "label"), [(0, "all"), (123456789012, "7")])
def test_one_click_draws_the_images_of_these_seeds(model: Path, page: Path, seed: int, label: str) -> None:
    found = opened(page, seed, label)
    assert found["seeds"] == list(range(seed, seed + 80))
    labels = [i % 10 for i in found["seeds"]] if label == "all" else [7] * 80
    assert found["labels"] == labels
    expected = load_model(model, device="cpu").sample(found["seeds"], labels=labels)
    images = np.array(found["values"], np.float32).reshape(expected.shape)
    assert np.abs(images - expected).max() <= 1e-4
    assert found["status"] == f"80 images in {found['seconds']:.2f} s, seeds {seed} to {seed + 79}"
    shown = np.array(found["first"]).reshape(8, 6, 4)[:, :, :3]
    assert np.abs(shown - (expected[0].transpose(1, 2, 0) + 1) * 127.5).max() <= 1


def test_a_file_that_is_not_the_stated_one_is_not_run(page: Path) -> None:
    script = page / "runtime" / web.SCRIPT
    original = script.read_bytes()
    script.write_bytes(original + b"\n// changed")
    try:
        wait = """
        new MutationObserver(() => report(document.querySelector("[role=status]").textContent))
          .observe(document.getElementById("page"), { subtree: true, childList: true, characterData: true });
        """
        found, _ = run_page(page, wait)
    finally:
        script.write_bytes(original)
    assert found.startswith("This did not work: ")


def test_the_pinned_files_are_those_of_the_package() -> None:
    if json.loads((Path(PACKAGE) / "package.json").read_text())["version"] != web.VERSION:
        pytest.skip("another version of onnxruntime-web")
    for name, stated in web.PINNED.items():
        digest = hashlib.sha384((Path(PACKAGE) / "dist" / name).read_bytes()).digest()
        assert stated == f"sha384-{base64.b64encode(digest).decode()}"
