"""The page of `udddm export --to web` in a browser. It needs Chromium, and onnxruntime-web in UDDDM_ONNXRUNTIME_WEB:

npm pack onnxruntime-web@1.30.0 && tar xf onnxruntime-web-1.30.0.tgz && export UDDDM_ONNXRUNTIME_WEB=$PWD/package
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm.runs.conditions import Examples
from udddm.runs.model import Model, load_model
from udddm.testing.browser import CHROMIUM, run_page
from udddm.testing.image_sets import png
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


GIVE = """
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
document.addEventListener("ready", async () => {
  const button = document.querySelector("button"), file = document.querySelector("input[type=file]");
  const started = button.disabled;
  if ("PNG") {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob("PNG"), (c) => c.charCodeAt(0))], "mine.png"));
    file.files = transfer.files;
    file.dispatchEvent(new Event("change"));
  } else {
    document.querySelector("select[name=example]").value = "1";
    document.querySelector("select[name=example]").dispatchEvent(new Event("change"));
  }
  while (button.disabled) await wait(20);
  const given = document.querySelector("canvas.given"), box = given.getBoundingClientRect();
  const at = (x, y) => ({ bubbles: true, clientX: box.left + (x + 0.5) * box.width / 6, clientY: box.top + (y + 0.5) * box.height / 8 });
  if (DRAG) {
    given.dispatchEvent(new PointerEvent("pointerdown", at(4, 6)));
    given.dispatchEvent(new PointerEvent("pointermove", at(2, 3)));
    given.dispatchEvent(new PointerEvent("pointerup", at(2, 3)));
  }
  document.addEventListener("drawn", (event) => {
    const { data } = given.getContext("2d").getImageData(0, 0, given.width, given.height);
    report({ ...event.detail, values: [...event.detail.values], preview: [...data], started });
  });
  button.click();
});
"""  # noqa: E501
PIXELS = np.random.default_rng(2).integers(0, 256, (2, 3, 8, 6), dtype=np.uint8)
CONDITIONS = {
    "downscale": "data.condition={kind: downscale, factor: 2}",
    "mask": "data.condition.kind=mask",
    "gray": "data.condition.kind=gray",
    "pairs": "data.condition.kind=pairs",
}


def conditional_model(kind: str) -> Model:
    network = "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: []"
    settings = [f"{network}, condition: channels, dropout: 0, classes: 0}}", "objective.name=ect", CONDITIONS[kind]]
    return random_model(*settings, shape=(3, 8, 6))


def drawn(page: Path, file: bytes | None, *, drag: bool = False) -> dict[str, Any]:
    script = GIVE.replace("PNG", base64.b64encode(file or b"").decode()).replace("DRAG", str(drag).lower())
    found, console = run_page(page, script, wait=150)
    assert console == [] and found is not None and "values" in found, (found, console)
    return dict(found)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_file_of_the_user_is_the_conditioning_image(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("PIL")
    model = conditional_model(kind)
    options = export.Options(runtime=Path(PACKAGE))
    export.write(saved(model, tmp_path / "model"), tmp_path / "page", "web", options)
    assert model.conditions is not None
    channels, height, width = model.conditions.given_shape
    pixels = PIXELS[0, :channels, :height, :width]
    found = drawn(tmp_path / "page", png(pixels), drag=kind == "mask")
    assert found["started"]  # nothing can be drawn before an image is chosen
    given: Any = pixels
    shown = pixels.repeat(3 // channels, 0).transpose(1, 2, 0).copy()
    if kind == "mask":
        given = pixels.astype(np.float32) / 127.5 - 1
        given[:, 3:7, 2:5] = np.nan
        shown[3:7, 2:5] = [96, 128, 224]
    expected = model.sample(range(16), conditions=given)
    images = np.array(found["values"], np.float32).reshape(expected.shape)
    assert np.abs(images - expected).max() <= 1e-4
    preview = np.array(found["preview"]).reshape(height, width, 4)[:, :, :3]
    assert np.abs(preview - shown.astype(int)).max() <= 1


def test_a_page_has_examples_of_the_data_set(tmp_path: Path) -> None:
    model = conditional_model("mask")
    given = torch.from_numpy(PIXELS.astype(np.float32) / 127.5 - 1)
    given[1, :, 2:4, 1:5] = torch.nan
    examples = Examples([0, 1], given, given, given, None)
    source = export.Source(model, "0.9", export.Facts("page"), examples)
    (tmp_path / "page").mkdir()
    web.write(source, tmp_path / "page", export.Options(runtime=Path(PACKAGE)))
    found = drawn(tmp_path / "page", None)
    expected = model.sample(range(16), conditions=given[1])
    images = np.array(found["values"], np.float32).reshape(expected.shape)
    assert np.abs(images - expected).max() <= 1e-4 and not found["started"]


def test_a_larger_file_is_cropped_and_one_that_is_no_image_is_named(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    model = conditional_model("pairs")
    export.write(saved(model, tmp_path / "model"), tmp_path / "page", "web", export.Options(runtime=Path(PACKAGE)))
    file = io.BytesIO()
    wide = image.new("RGB", (40, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (14, 0, 26, 16))  # the central part in the proportions of the model
    wide.save(file, "PNG")
    found = drawn(tmp_path / "page", file.getvalue())
    preview = np.array(found["preview"]).reshape(8, 6, 4)[:, :, :3]
    assert np.abs(preview - [0, 0, 255]).max() <= 1
    script = """
    document.addEventListener("ready", () => {
      const transfer = new DataTransfer(), file = document.querySelector("input[type=file]");
      transfer.items.add(new File(["text"], "notes.txt"));
      file.files = transfer.files;
      file.dispatchEvent(new Event("change"));
      const status = document.querySelector("[role=status]");
      new MutationObserver(() => status.textContent.startsWith("notes") && report(status.textContent))
        .observe(status, { childList: true, characterData: true, subtree: true });
    });
    """
    said, _ = run_page(tmp_path / "page", script)
    assert said == "notes.txt is not an image that this browser reads"
