"""`udddm export` of models with `data.condition`: every format takes the image that is given, and draws the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import rng
from udddm.cli.main import main
from udddm.errors import ConfigError
from udddm.runs.model import Model, load_model
from udddm.testing.models import random_model, saved
from udddm.tools import export

NETWORK = "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0"
SHAPE = (3, 8, 6)
KINDS = {
    "downscale": ("data.condition={kind: downscale, factor: 2}", (3, 4, 3)),
    "mask": ("data.condition.kind=mask", SHAPE),
    "gray": ("data.condition.kind=gray", (1, 8, 6)),
    "pairs": ("data.condition.kind=pairs", SHAPE),
}
ECT = "objective.name=ect"


def model_of(kind: str, condition: str = "channels") -> Model:
    settings = [KINDS[kind][0], f"{NETWORK}, condition: {condition}, classes: 0}}", ECT]
    return random_model(*settings, shape=SHAPE)


def given_of(kind: str, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Conditioning images as a user gives them, NaN in a hidden rectangle."""
    drawn = np.random.default_rng(5).uniform(-1, 1, (count, *KINDS[kind][1])).astype(np.float32)
    if kind == "mask":
        drawn[:, :, 1:5, 2:4] = np.nan
    return drawn


EXPORTED = ["downscale", "mask", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gray", "pairs"))]


@pytest.mark.parametrize("kind", EXPORTED)
def test_the_onnx_file_takes_the_image_that_is_given(tmp_path: Path, kind: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_of(kind)
    export.write(saved(model, tmp_path / "model"), tmp_path / "out", "onnx")
    told = json.loads((tmp_path / "out" / "model.json").read_text())
    names = ["noise", "condition", *(["mask"] if kind == "mask" else [])]
    assert [each["name"] for each in told["inputs"]] == names and told["condition"] == kind
    assert told["inputs"][1]["shape"] == ["batch", *KINDS[kind][1]] and told["largest_difference"] <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for count in (1, 5):
        seeds, given = range(40, 40 + count), given_of(kind, count)
        noise = rng.normal(rng.as_tensor(rng.keys(0, rng.Stream.SAMPLE_NOISE, np.array(seeds))), SHAPE)
        feeds = {"noise": noise.numpy(), "condition": given}
        if kind == "mask":
            hidden = np.isnan(given[:, :1])
            feeds |= {"condition": np.where(hidden, np.float32(0.3), given), "mask": hidden.astype(np.float32)}
        (images,) = session.run(None, feeds)
        expected = model.sample(seeds, conditions=given)
        assert np.abs(images - expected).max() <= 1e-4
        assert np.abs(expected - model.sample(seeds, conditions=np.zeros_like(given))).max() > 0.01


@pytest.mark.slow
def test_attention_to_a_given_image_in_half_precision(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: []"
    settings = [KINDS["downscale"][0], f"{network}, dropout: 0, condition: cross-attention, classes: 3}}", ECT]
    model = random_model(*settings, shape=SHAPE, scale=0.1)
    export.write(saved(model, tmp_path / "model"), tmp_path / "out", "onnx", export.Options(precision="fp16"))
    told = json.loads((tmp_path / "out" / "model.json").read_text())
    assert [each["name"] for each in told["inputs"]] == ["noise", "condition", "label"]
    assert 0 < told["largest_difference"] <= 0.05


@pytest.mark.parametrize("kind", ["downscale", "mask"])
def test_a_pipeline_takes_images_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = model_of(kind)
    export.write(saved(model, tmp_path / "model"), tmp_path / "out", "diffusers")
    assert not (tmp_path / "out" / "grid.png").exists()  # there is nothing to draw from
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    channels, height, width = KINDS[kind][1]
    pixels = np.random.default_rng(1).integers(0, 256, (2, height, width, channels), dtype=np.uint8)
    pictures = [image.fromarray(each) for each in pixels]
    arrays = pixels.transpose(0, 3, 1, 2)
    given: np.ndarray[Any, Any] = arrays
    mask: dict[str, Any] = {}
    if kind == "mask":
        white = np.zeros((height, width), np.uint8)
        white[1:5, 2:4] = 255
        mask = {"mask_image": image.fromarray(white)}
        given = np.where(white[None, None] > 0, np.float32("nan"), arrays.astype(np.float32) / 127.5 - 1)
    expected = model.sample([3, 4], conditions=given)
    for value in (pictures, arrays, torch.from_numpy(arrays.astype(np.float32) / 127.5 - 1)):
        drawn = pipe(seeds=[3, 4], image=value, output_type="pt", **mask).images.numpy()
        assert np.abs(drawn - expected).max() <= 1e-4
    assert len(pipe(image=pictures, **mask).images) == 2 and len(pipe(3, image=pictures[0], **mask).images) == 3
    larger = image.new("RGB", (width + 1, height))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image": larger, **mask}, rf"image has {width + 1}x{height} pixels .*needs {width}x{height}"),
        ({}, "conditioned on images"),
        ({"image": pictures, "mask": 1}, "unknown argument mask"),
        ({"image": pictures} | ({} if mask else {"mask_image": pictures[0]}), "mask_image"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ConfigError, match=message):
            pipe(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_without_data_says_how_to_sample(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    lines = export.write(saved(model, tmp_path / "model"), tmp_path / "out", "safetensors")
    assert any("the data set is not at hand" in line for line in lines)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors", ".md"}
    card = (tmp_path / "out" / "README.md").read_text()
    channels, height, width = KINDS[kind][1]
    assert "image-to-image" in card and f"[N, {channels}, {height}, {width}]" in card and "grid.png" not in card
    assert f"udddm sample FOLDER --condition image.png{' --mask' if kind == 'mask' else ''}" in card
    given = given_of(kind, 2)
    assert np.array_equal(
        udddm.sample(tmp_path / "out", [1, 2], conditions=given), model.sample([1, 2], conditions=given)
    )
    assert load_model(tmp_path / "out", device="cpu").conditions == model.conditions


def test_leaving_out_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = saved(random_model(f"{NETWORK}, condition: none}}"), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--no-data has no effect: .* is not conditioned on images"):
        export.write(plain, tmp_path / "out", "safetensors", export.Options(data=False))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["export", str(plain), "--to", "onnx", "--no-data"])
    assert "--no-data has no effect with --to onnx" in capsys.readouterr().err
