"""`udddm export`: every format gives the images of `Model.sample`, and a folder is complete or absent."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import udddm
from udddm import rng
from udddm.cli.main import main
from udddm.config import load_config, resolve
from udddm.errors import CheckpointError, ConfigError
from udddm.runs.model import load_model
from udddm.runs.release import shareable
from udddm.testing.models import random_model, saved
from udddm.tools import export
from udddm.tools.export import web

NETWORK = "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0"


class Random(nn.Module):
    """A network whose output is not a function of its input."""

    def __init__(self, context: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, noisy: torch.Tensor, c_noise: torch.Tensor, condition: None, labels: None) -> torch.Tensor:
        return self.weight * torch.rand_like(noisy)


class Fixed(Random):
    """A network that traces the size of its batch."""

    def forward(self, noisy: torch.Tensor, c_noise: torch.Tensor, condition: None, labels: None) -> torch.Tensor:
        return self.weight * noisy / len(noisy)


class Branch(Random):
    """A network whose operations depend on values."""

    def forward(self, noisy: torch.Tensor, c_noise: torch.Tensor, condition: None, labels: None) -> torch.Tensor:
        return self.weight * (noisy if noisy.sum() > 0 else -noisy)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of a model with classes."""
    return saved(
        random_model(f"{NETWORK}, condition: none, classes: 3}}"), tmp_path_factory.mktemp("export") / "labeled"
    )


def test_a_run_becomes_a_release_with_the_same_images_and_no_path(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.zeros((64, 1, 8, 8), np.float32) + np.linspace(-1, 1, 64)[:, None, None, None])
    data = f"data={{name: array, path: {tmp_path / 'own.npy'}}}"
    settings = [data, f"{NETWORK}, condition: none}}", "steps=4", "ema=0.9,0.5", "objective=ict"]
    settings += ["objective.pretrain=0", "sample={every_steps: 0, final: 0}", "log_every_steps=2"]
    run = tmp_path / "run"
    assert main(["train", "--config", "digits", "--device", "cpu", "--run-dir", str(run), *settings]) == 0
    scores = [{"step": 2, "fd": 9.0}, {"step": 4, "fd": 7.25, "evaluations": 1}, {"step": 4, "fd": 5, "evaluations": 2}]
    (run / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))

    export.write(run, tmp_path / "first", "safetensors")
    for seed in ([3], range(20)):
        assert np.array_equal(udddm.sample(tmp_path / "first", seed), udddm.sample(run, seed))
    card = (tmp_path / "first" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "udddm" and "ict" in front["tags"]
    assert "| images seen | 0.256 thousand |" in card and "array: 64 images of 1x8x8" in card
    assert "after 256 images" in card and "| 1 | 7.25 |\n| 2 | 5 |\n" in card
    assert (tmp_path / "first" / "grid.png").read_bytes()[:4] == b"\x89PNG"
    export.write(run, tmp_path / "second", "hub", export.Options(ema="0.50"))
    assert "another average of this run (EMA 0.9, not 0.5)" in (tmp_path / "second" / "README.md").read_text()
    other = udddm.sample(load_model(run, ema=0.5), range(4))
    assert np.array_equal(udddm.sample(tmp_path / "second", range(4)), other)
    theirs = json.loads((run / "run.json").read_text())
    theirs["config"]["schedule"]["kind"] = "json:loads"
    (run / "run.json").write_text(json.dumps(theirs))  # unlike the checkpoint's: it would be called with a Section
    export.write(run, tmp_path / "third", "safetensors")
    for path in (*(tmp_path / "first").iterdir(), *(tmp_path / "second").iterdir()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert np.array_equal(np.load(tmp_path / "first" / "samples.npy"), udddm.sample(run, range(64)))


def test_no_setting_of_a_release_names_a_place() -> None:
    places = {
        "data": "{name: array, path: /private/x.npy}",
        "store.url": "/private/state",
        "train.init_from": "/private/run",
        "evaluate.features": "inception,/private/features.pt",
        "evaluate.inception_weights": "/private/weights.pth",
        "evaluate.reference": "/private/reference.npz",
        "loggers": "private:Logger",
    }
    config = load_config("digits", [f"{key}={value}" for key, value in places.items()])
    tree = shareable(config)
    assert "private" not in json.dumps(tree)
    assert resolve(tree).evaluate.features == ("inception", "features.pt")


@pytest.mark.parametrize("average", ["none", "power-0.1", "0.99"])
def test_a_release_of_a_release_has_the_same_average(tmp_path: Path, average: str) -> None:
    first = saved(random_model(f"{NETWORK}, condition: none}}", "ema=0.7"), tmp_path / "first", average)
    export.write(first, tmp_path / "second", "safetensors")
    one, two = (next(folder.glob("*.safetensors")) for folder in (first, tmp_path / "second"))
    assert one.name == two.name == ("model.safetensors" if average == "none" else f"ema-{average}.safetensors")
    assert one.read_bytes() == two.read_bytes()
    assert np.array_equal(udddm.sample(first, range(4)), udddm.sample(tmp_path / "second", range(4)))


def test_the_onnx_file_takes_any_batch_and_class(labeled: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    export.write(labeled, tmp_path / "out", "onnx")
    told = json.loads((tmp_path / "out" / "model.json").read_text())
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    shapes = {each["name"]: each["shape"] for each in told["inputs"] + told["outputs"]}
    assert {each.name: each.shape for each in [*session.get_inputs(), *session.get_outputs()]} == shapes
    assert shapes == {"noise": ["batch", 1, 8, 8], "label": ["batch"], "image": ["batch", 1, 8, 8]}
    stated = onnx.load(tmp_path / "out" / "model.onnx").opset_import
    assert {each.domain: each.version for each in stated}[""] == told["opset"] == 18
    assert told["classes"] == 3 and told["precision"] == "fp32" and told["largest_difference"] <= 1e-4
    model = load_model(labeled, device="cpu")
    for count in (1, 2, 17):
        seeds, labels = range(100, 100 + count), [(i * 2 + 1) % 3 for i in range(count)]
        noise = rng.normal(rng.as_tensor(rng.keys(0, rng.Stream.SAMPLE_NOISE, np.array(seeds))), (1, 8, 8))
        (images,) = session.run(None, {"noise": noise.numpy(), "label": np.array(labels)})
        expected = model.sample(seeds, labels=labels)
        assert np.abs(images - expected).max() <= 1e-4 and np.abs(images).max() <= 1
        assert count < 2 or np.abs(expected - model.sample(seeds, labels=[0] * count)).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_onnx_file_of_a_network_with_attention_to_a_condition(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("onnxruntime")
    network = "network={base_channels: 8, channel_mult: [1, 2], blocks_per_level: 1, attention_resolutions: [4]"
    model = random_model(f"{network}, patch: 1, condition: cross-attention, classes: 10}}", shape=(3, 7, 9), scale=0.1)
    options = export.Options(precision=precision)  # type: ignore[arg-type]
    export.write(saved(model, tmp_path / "model"), tmp_path / "out", "onnx", options)
    told = json.loads((tmp_path / "out" / "model.json").read_text())
    assert [each["name"] for each in told["inputs"]] == ["noise", "condition", "label"]
    assert told["largest_difference"] <= (1e-4 if precision == "fp32" else 0.05)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        ("Random", CheckpointError, "differs from PyTorch by"),
        ("Fixed", ConfigError, "use x.shape[0] instead of len(x)"),
        ("Branch", ConfigError, "no branches that depend on the values"),
    ],
)
def test_a_network_that_onnx_cannot_hold_leaves_no_folder(
    tmp_path: Path, network: str, error: type[Exception], message: str
) -> None:
    pytest.importorskip("onnxruntime")
    model = random_model(f"network={{name: '{__name__}:{network}', condition: none}}")
    options = export.Options(trust=True)
    with pytest.raises(error) as caught:
        export.write(saved(model, tmp_path / "model"), tmp_path / "out", "onnx", options)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ConfigError, match="would import code"):
        export.write(tmp_path / "model", tmp_path / "out", "onnx")


def test_diffusers_loads_the_folder_and_draws_the_same_images(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    export.write(labeled, tmp_path / "out", "diffusers")
    model = load_model(labeled, device="cpu")
    for options in ({}, {"custom_pipeline": str(tmp_path / "out")}):
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True, **options)
        images = pipe(seeds=range(5), output_type="pt").images.numpy()
        assert np.abs(images - model.sample(range(5))).max() <= 1e-4
    several = pipe(seeds=[7, 8], class_labels=[2, 2], num_inference_steps=3, output_type="np", return_dict=False)[0]
    expected = model.sample([7, 8], labels=[2, 2], steps=3)
    assert np.abs(several - (expected.transpose(0, 2, 3, 1) + 1) / 2).max() <= 1e-4
    drawn = [pipe(3, generator=torch.Generator().manual_seed(1), output_type="pt").images for _ in range(2)]
    assert torch.equal(*drawn) and len(drawn[0]) == 3
    assert pipe(2).images[0].size == (8, 8)
    with pytest.raises(ConfigError, match="output_type='jpg'"):
        pipe(output_type="jpg")


def test_a_diffusers_folder_never_imports_what_its_configuration_names(labeled: Path, tmp_path: Path) -> None:
    diffusers_pipeline = pytest.importorskip("udddm.tools.export.diffusers_pipeline", exc_type=ImportError)
    model = random_model(f"network={{name: '{__name__}:Random', condition: none}}")
    with pytest.raises(ConfigError, match=r"network\.name=.*built-in"):
        export.write(saved(model, tmp_path / "model"), tmp_path / "out", "diffusers", export.Options(trust=True))
    assert not (tmp_path / "out").exists()
    export.write(labeled, tmp_path / "out", "diffusers")
    path = tmp_path / "out" / "generator" / "config.json"
    theirs = json.loads(path.read_text())
    theirs["run"]["network"]["name"] = "evil:make"
    path.write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match="would import code"):
        diffusers_pipeline.GeneratorModel.from_pretrained(path.parent)


def test_a_page_states_the_files_that_it_loads(labeled: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    package = tmp_path / "package" / "dist"
    package.mkdir(parents=True)
    for name in (web.SCRIPT, web.BINARY):
        (package / name).write_text(name)
    model = load_model(labeled, device="cpu")
    source = export.Source(replace(model), "0.9", export.Facts("</script>&"))
    for runtime in (package.parent, package, None):
        folder = tmp_path / f"out-{runtime is package}-{runtime is None}"
        folder.mkdir()
        script, binary = web._runtime(runtime, folder)
        page = web._page({"name": source.facts.name, "script": vars(script)}, local=runtime is not None)
        assert page.count("</script>") == 2 and script.integrity in page
        if runtime is None:
            assert (
                script.url.endswith(f"@{web.VERSION}/dist/{web.SCRIPT}") and binary.integrity == web.PINNED[web.BINARY]
            )
        else:
            copy = (folder / binary.url).read_bytes()
            assert binary.integrity == f"sha384-{base64.b64encode(hashlib.sha384(copy).digest()).decode()}"
            assert web.CDN not in page
    (package / web.BINARY).unlink()
    with pytest.raises(ConfigError, match=r"has no file dist/ort-wasm-simd-threaded\.wasm.*npm pack"):
        export.write(labeled, tmp_path / "none", "web", export.Options(runtime=package.parent))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("what", ["a folder with a file", "a file"])
def test_what_exists_is_not_touched(labeled: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="name a new folder"):
        export.write(labeled, out, "safetensors")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_a_checkpoint_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'run'} holds no checkpoint\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_is_filled(labeled: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export.write(labeled, tmp_path / "out", "safetensors")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "ema-0.9.safetensors",
        "samples.npy",
        "grid.png",
        "README.md",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_package_is_named(labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, to, extra in (("onnx", "onnx", "onnx"), ("diffusers", "diffusers", "diffusers")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "udddm.tools.export.diffusers_pipeline", raising=False)
        with pytest.raises(ConfigError, match=rf"pip install 'udddm\[{extra}\]'"):
            export.write(labeled, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()
