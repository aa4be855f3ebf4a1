"""Data that are not those of the run, or not the same on every rank, and directories that are not a run's."""

from pathlib import Path

import numpy as np
import pytest
import torch

import udddm
from udddm.cli import evaluate as evaluate_command
from udddm.cli import store as store_command
from udddm.config import EvaluateConfig, RunConfig, resolve
from udddm.data import ArrayImages, ImageDataset, check_agreement, check_unchanged
from udddm.data import images as image_types
from udddm.data.arrays import open_array
from udddm.errors import ConfigError, DataError
from udddm.evaluation.background import BackgroundEvaluation
from udddm.evaluation.features import check_channels
from udddm.files import load_json
from udddm.runs.pretrained import recorded_data
from udddm.runs.run import OWN_FILES, check_or_record
from udddm.training.trainer import Trainer

PIXELS = np.random.default_rng(3).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
FEATURES = """
import torch

def network(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)
"""


def small() -> RunConfig:
    return resolve(
        {
            "network": {"base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
            "objective": {"name": "ict", "refined": {"share": 0.5}},
            "train": {"steps": 1, "batch_size": 8},
            "sample": {"every_steps": 0},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data that were given from Python: its configuration names the digits."""
    run = tmp_path_factory.mktemp("same-data") / "run"
    udddm.train(small(), dataset=ArrayImages(PIXELS), run_dir=run, device="cpu")
    return run


def fingerprints(*arrays: np.ndarray) -> list[dict[str, object]]:
    return [ImageDataset(array).fingerprint() for array in arrays]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PIXELS[:44], r"rank 1 \(b\) has samples 44, but rank 0 \(a\) has 64"),
        (PIXELS[:, :1], r"rank 1 \(b\) has images of shape \[1, 8, 8\], but rank 0 \(a\) has \[3, 8, 8\]"),
        (PIXELS[::-1].copy(), r"rank 1 \(b\) and rank 0 \(a\) read different data sets of 64 samples"),
    ],
)
def test_ranks_with_other_data_are_named(other: np.ndarray, message: str) -> None:
    places = ["rank 0 (a)", "rank 1 (b)"]
    check_agreement(fingerprints(PIXELS, PIXELS.copy()), places)
    with pytest.raises(DataError, match=message):
        check_agreement(fingerprints(PIXELS, other), places)


def test_the_data_of_a_run_are_found_from_its_checkpoints(trained: Path) -> None:
    wanted = ImageDataset(PIXELS).fingerprint()
    checkpoint = next((trained / "checkpoints").iterdir())
    assert recorded_data(trained) == recorded_data(str(checkpoint)) == wanted
    assert recorded_data(f"file://{trained}") == wanted


def test_a_run_is_not_scored_against_data_that_it_was_not_trained_on(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "their_features.py").write_text(FEATURES)
    monkeypatch.syspath_prepend(str(tmp_path))
    score = ["--checkpoint", str(trained), "--features", "their_features:network", "--count", "16", "--device", "cpu"]
    score += ["--cache", str(tmp_path / "cache")]
    assert evaluate_command.main(score) == 1
    said = capsys.readouterr().err
    assert "it had 64 samples and now has 1797" in said and "cannot be scored against it" in said
    for name, pixels in (("same", PIXELS), ("other", PIXELS[::-1])):
        np.save(tmp_path / f"{name}.npy", pixels)
        path = tmp_path / f"{name}.npy"
        assert evaluate_command.main([*score, "--set", "data.name=array", "--set", f"data.path={path}"]) == 0
        assert ("scoring against a data set that is not" in capsys.readouterr().err) == (name == "other")


def test_a_view_leaves_out_an_image_of_other_data(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store_command.main(["view", str(trained), "--sample", "5", "--out", str(tmp_path / "v.png")]) == 0
    said = capsys.readouterr()
    assert "the image is omitted: the data set is not the one" in said.err
    assert "the image" not in said.out


@pytest.mark.parametrize("channels", [2, 4])
def test_inception_refuses_what_is_neither_gray_nor_color(channels: int) -> None:
    with pytest.raises(ConfigError, match=f"these have {channels} channels. Decode latents first"):
        check_channels("inception", channels)
    data = ImageDataset(np.zeros((8, channels, 16, 16), np.float32))
    with pytest.raises(ConfigError, match="Decode latents first"):  # at the start, not at the first evaluation
        BackgroundEvaluation(EvaluateConfig(), data, torch.device("cpu"), Path())
    check_channels("inception", 1)
    check_channels("inception", 3)
    check_channels("mine:network", channels)


@pytest.mark.parametrize("name", OWN_FILES)
def test_files_of_somebody_else_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds {name} but no run\.json"):
        check_or_record(tmp_path, small(), ImageDataset(PIXELS))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_start_that_was_killed_between_its_first_files_goes_on(tmp_path: Path) -> None:
    data = ImageDataset(PIXELS)
    check_or_record(tmp_path, small(), data)
    written = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").unlink()  # run.json is the first
    check_or_record(tmp_path, small(), data)
    assert (tmp_path / "config.yaml").read_text() == written


@pytest.mark.parametrize("kind", ["in memory", "memory-mapped"])
def test_any_changed_sample_of_an_array_is_found(kind: str, tmp_path: Path) -> None:
    def source(pixels: np.ndarray) -> ImageDataset:
        if kind == "in memory":
            return ImageDataset(pixels)
        np.save(tmp_path / "pixels.npy", pixels)
        return ImageDataset(open_array(str(tmp_path / "pixels.npy")))

    changed = PIXELS.copy()
    changed[2, 0, 0, 0] ^= 1  # not one of the 16 probes
    recorded, now = source(PIXELS).fingerprint(), source(changed).fingerprint()
    assert recorded["digest"] == now["digest"]
    with pytest.raises(DataError, match="the contents of its samples differ"):
        check_unchanged(recorded, now)
    check_unchanged(recorded, source(PIXELS.copy()).fingerprint())
    channels_last = source(PIXELS.transpose(0, 2, 3, 1)).fingerprint()
    check_unchanged(recorded, channels_last)
    earlier = {key: value for key, value in recorded.items() if key != "content"}
    check_unchanged(earlier, now)


def test_the_same_images_as_floats_are_compared_by_their_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = ImageDataset(PIXELS).fingerprint()
    check_unchanged(recorded, ImageDataset(PIXELS.astype(np.float32) / 127.5 - 1).fingerprint())
    monkeypatch.setattr(image_types, "LARGEST_CONTENT", 1000)
    assert "content" not in ImageDataset(PIXELS).fingerprint()


@pytest.mark.parametrize("kind", ["gpu", "pinned", "zarr"])
@pytest.mark.parametrize("changed", ["network.attention_resolutions=[8]", "order.lanes=4", "store.dtype=fp32"])
def test_a_run_that_has_not_trained_yet_takes_a_corrected_configuration(
    kind: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a store of the first start is in the directory, with another order or dtype."""
    run, store = tmp_path / "run", f"store.kind={kind}"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: None)  # fails when it is added to the loss
        with pytest.raises(TypeError):
            udddm.train(small(), PIXELS[:32], overrides=[store, changed], run_dir=run, device="cpu")
    assert (run / "run.json").exists() and (run / "state").exists() == (kind == "zarr")
    result = udddm.train(small(), PIXELS, device="cpu", overrides=[store], run_dir=run)
    undisturbed = udddm.train(small(), PIXELS, device="cpu", overrides=[store], run_dir=tmp_path / "undisturbed")
    assert (result.weights_sha256, result.state_sha256) == (undisturbed.weights_sha256, undisturbed.state_sha256)


def test_a_corrected_configuration_is_recorded_with_the_same_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = tmp_path / "run", small().model_dump(mode="json")
    settings["network"]["attention_resolutions"] = [8]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: None)
        with pytest.raises(TypeError):
            udddm.train(settings, PIXELS[:32], run_dir=run, device="cpu")
    first = load_json(run / "run.json")["id"]
    caplog.set_level("INFO", "udddm")
    udddm.train(small(), PIXELS, run_dir=run, device="cpu")
    assert "which has no checkpoint yet: " in caplog.text and "attention_resolutions: [8] -> []" in caplog.text
    assert load_json(run / "run.json")["id"] == first
    assert "attention_resolutions: []" in (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="belongs to a run of another configuration"):
        udddm.train(settings, PIXELS, run_dir=run, device="cpu")
