"""`udddm train DATA`: settings that are chosen for a data set, and a run with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from udddm.cli.command import USAGE
from udddm.cli.train import main as train_command
from udddm.config import load_config
from udddm.data import ImageDataset, load_dataset
from udddm.errors import ConfigError
from udddm.networks import outline
from udddm.tools import automatic
from udddm.tools.automatic import Machine

SHORT = ["train.steps=2", "sample.final=0", "train.batch_size=16", "--device", "cpu"]
RNG = np.random.default_rng(0)


def folder(place: Path, sizes: list[tuple[int, int]], mode: str, count: int, classes: int = 0) -> Path:
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        shape = (height, width) if mode == "L" else (height, width, 3)
        target = place / (f"class-{number % classes}" if classes else ".")
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, shape, np.uint8)).save(target / f"{number:04}.png")
    return place


def digits(place: Path) -> Path:
    dataset = ImageDataset(load_dataset(load_config(None, ["train.steps=1"]).data))
    images, labels = dataset.batch(np.arange(200))
    assert labels is not None
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (place / str(int(label))).mkdir(parents=True, exist_ok=True)
        pixels = ((image[0].numpy() + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(pixels).save(place / str(int(label)) / f"{number}.png")
    return place


def array(place: Path, *shape: int) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    np.savez(place, images=RNG.integers(0, 256, shape, np.uint8))
    return place


DATA = {
    "digits as PNGs": (lambda p: digits(p), (1, 8, 8), 10),
    "28x28": (lambda p: array(p.with_suffix(".npz"), 200, 28, 28), (1, 28, 28), 0),
    "32x32 in color": (lambda p: folder(p, [(32, 32)], "RGB", 100), (3, 32, 32), 0),
    "48x48": (lambda p: folder(p, [(48, 48)], "RGB", 80, classes=2), (3, 48, 48), 2),
    "28x36": (lambda p: folder(p, [(28, 36)], "RGB", 80), (3, 28, 36), 0),
    "one channel": (lambda p: folder(p, [(20, 20)], "L", 80), (1, 20, 20), 0),
    "four channels": (lambda p: array(p.with_suffix(".npz"), 100, 4, 16, 16), (4, 16, 16), 0),
    "different sizes": (lambda p: folder(p, [(50, 70), (60, 40)], "RGB", 80), (3, 32, 32), 0),
}


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((3, 32, 32), 4), ((3, 48, 48), 4), ((1, 32, 32), 2), ((1, 28, 28), 2), ((4, 16, 16), 2), ((3, 64, 64), 4)],
)
def test_a_core_trains_on_enough_images_unless_its_patches_would_be_too_large(
    shape: tuple[int, int, int], patch: int, tmp_path: Path
) -> None:
    """3x32x32 in patches of 2 would train on 130,000 images in the time, and with patches of 4 on four times as many.
    Patches of 8 of 3x64x64 would have 192 values, more than the 64 channels can pass on."""
    where = array(tmp_path / "images.npz", 200, *shape)
    config, _ = automatic.choose(automatic.data_section(str(where)), Machine(False))
    assert config.network.patch == patch
    enough = (config.train.steps or 0) * config.train.batch_size >= automatic.ENOUGH
    assert enough == (shape != (3, 64, 64)) and shape[0] * patch**2 <= config.network.base_channels


@pytest.mark.parametrize("name", DATA)
def test_settings_fit_the_data_and_train(name: str, tmp_path: Path) -> None:
    make, shape, classes = DATA[name]
    place = make(tmp_path / "pictures")
    section = automatic.data_section(str(place))
    for machine in (Machine(False), Machine(True, 24), Machine(True, 8, bf16=False)):
        config, lines = automatic.choose(section, machine)
        assert len(lines) <= 10 and config.network.classes == classes
        assert config.train.batch_size <= len(ImageDataset(load_dataset(config.data))) / 2
        assert outline(config.network, shape) is not None
        assert (config.train.precision == "fp32") == (not machine.cuda)
        assert config.order.lanes is None  # the data set decides, so that a large one can grow
    run = tmp_path / "run"
    assert train_command([str(place), *SHORT, "--run-dir", str(run)]) == 0
    assert ImageDataset(load_dataset(load_config(run / "config.yaml").data)).shape == shape


def test_the_choice_follows_the_settings_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder(tmp_path / "pictures", [(48, 48)], "RGB", 80)
    shown = []
    for changes in ([], ["data.size=16"]):
        assert train_command([str(place), *changes, "--print-config", "--device", "cpu"]) == 0
        shown.append(yaml.safe_load(capsys.readouterr().out))
    assert [each["data"]["size"] for each in shown] == [None, 16]
    small = automatic.choose({"name": "folder", "path": str(place), "size": 16}, Machine(False))[0]
    assert shown[1]["network"] == small.model_dump(mode="json")["network"] != shown[0]["network"]


def test_the_same_command_resumes_the_run_that_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would now choose otherwise, as on another machine."""
    place, run = digits(tmp_path / "pictures"), tmp_path / "run"
    assert train_command([str(place), *SHORT, "--run-dir", str(run)]) == 0
    monkeypatch.setattr(automatic, "choose", lambda *_: pytest.fail("settings were chosen again"))
    assert train_command([str(place), *SHORT, "train.steps=2", "--run-dir", str(run)]) == 0


def test_a_run_on_other_data_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train_command([str(digits(tmp_path / "first")), *SHORT, "--run-dir", str(run)]) == 0
    assert train_command([str(digits(tmp_path / "second")), *SHORT, "--run-dir", str(run)]) == USAGE
    assert "was begun on" in capsys.readouterr().err


def test_the_choice_can_be_printed_edited_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = digits(tmp_path / "pictures")
    assert train_command([str(place), "--print-config", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["data"]["path"] == str(place)
    (tmp_path / "mine.yaml").write_text(printed)
    assert (
        load_config(tmp_path / "mine.yaml") == automatic.choose(automatic.data_section(str(place)), Machine(False))[0]
    )


def test_sigma_data_is_that_of_the_pixels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((100, 1, 8, 8), 0.25, np.float32) * RNG.choice([-1, 1], (100, 1, 8, 8)))
    config, _ = automatic.choose(automatic.data_section(str(tmp_path / "a.npy")), Machine(False))
    assert config.schedule.sigma_data == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--data", "nowhere"],
            "nowhere: there is no such folder or file; the built-in data sets are digits, fashion-mnist",
        ),
        (["HERE/few"], "5 images are too few to train on; give 64 or more"),
        (["HERE/few", "--config", "digits"], "give one, or set data.path="),
        (["HERE/few", "--data", "digits"], "two data sets"),
        (["HERE/run"], "is a run, not a data set: udddm train --config"),
        (["HERE/archive.7z"], "unpack it, and give the folder with the images"),
    ],
)
def test_mistakes(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "few", [(8, 8)], "L", 5)
    (tmp_path / "archive.7z").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    given = [each.replace("HERE", str(tmp_path)) for each in arguments]
    try:
        code = train_command(given)
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code == USAGE or (code == 1 and "images" in said)
    assert said in capsys.readouterr().err


def test_a_place_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        automatic.data_section("/nowhere/at/all")
