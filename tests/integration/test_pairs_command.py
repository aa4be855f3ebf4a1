"""Two folders of pairs on the command line: train, evaluate, sample, report, export."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import udddm
from udddm.cli.command import USAGE
from udddm.cli.main import main
from udddm.data import ImageDataset, load_dataset
from udddm.testing.browser import CHROMIUM, run_page
from udddm.testing.image_sets import png
from udddm.tools import export, report

pytest.importorskip("PIL")
COUNT = 70
PIXELS = np.random.default_rng(8).integers(0, 256, (COUNT, 3, 8, 8), dtype=np.uint8)
TINY = [
    "network={patch: 2, base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: []}",
    "train={steps: 4, batch_size: 32, ema: [0.9], warmup_steps: 0}",
    "checkpoint={every_steps: 2}",
    "sample={every_steps: 2, final: 4}",
    "data.flip=true",
    "log_every_steps=2",
    "store.kind=gpu",
]


def write(folder: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    folder.mkdir(parents=True)
    for index, image in enumerate(pixels):
        (folder / f"{index:03d}.png").write_bytes(png(image))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos and their negatives, in subfolders, which `udddm train` has chosen settings for."""
    root = tmp_path_factory.mktemp("pairs")
    for part, rows in (("2020", slice(0, 40)), ("2021/spring", slice(40, COUNT))):
        write(root / "photos" / part, PIXELS[rows])
        write(root / "sketches" / part, 255 - PIXELS[rows])
    pairs = ["data.condition.kind=pairs", f"data.condition.path={os.path.relpath(root / 'sketches')}"]
    command = ["train", str(root / "photos"), "--run-dir", str(root / "run"), "--device", "cpu", *pairs, *TINY]
    assert main(command) == 0
    assert main(command) == 0  # resumes the finished run
    return root / "run"


def conditions(run: Path) -> Path:
    return run.parent / "sketches"


def values(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    (first,) = json.loads(found[1])["runs"]
    return dict(first)


def test_it_is_scored_without_naming_its_data_again_but_somebody_elses_is_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    arguments = ["--features", "custom_metric:pixels", "--count", "20", "--device", "cpu", "--cache", str(tmp_path)]
    scores = tmp_path / "scores.json"
    assert main(["evaluate", str(run), *arguments, "--json", str(scores)]) == 0
    model = udddm.load_model(run, device="cpu")
    images = model.sample(range(20), conditions=255 - PIXELS[:20])
    dataset = load_dataset(model.config.data)
    expected = udddm.evaluate(images, dataset, features="custom_metric:pixels")
    assert json.loads(scores.read_text())["fd"] == pytest.approx(expected.fd, rel=1e-4)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another account"))
    capsys.readouterr()
    assert main(["evaluate", str(run), *arguments]) == USAGE
    said = capsys.readouterr().err
    assert f"data.path={run.parent / 'photos'}" in said and f"data.condition.path={conditions(run)}" in said
    given = [f"data.path={run.parent / 'photos'}", f"data.condition.path={conditions(run)}"]
    assert main(["evaluate", str(run), *arguments, *given]) == 0
    assert "No samples: the configuration of" in report.collect(run, device="cpu")["notes"][0]
    lines = export.write(run, tmp_path / "out", "safetensors")
    assert any("the data set is not at hand: the configuration of" in line for line in lines)


def test_a_changed_configuration_is_somebody_elses(run: Path) -> None:
    from udddm.runs.own import is_own

    data = udddm.load_model(run, device="cpu").config.data
    assert is_own(run, data) and is_own(next((run / "checkpoints").iterdir()), data)
    for update in ({"path": "/etc"}, {"name": "json:loads"}, {"arguments": {"a": 1}}):
        assert not is_own(run, data.model_copy(update=update))
    other = data.condition.model_copy(update={"path": "/etc"})
    assert not is_own(run, data.model_copy(update={"condition": other}))


def test_samples_take_a_folder_of_conditions(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["sample", str(run), "--condition", str(conditions(run)), "--out", str(out), "--device", "cpu"]) == 0
    expected = udddm.sample(run, range(COUNT), conditions=255 - PIXELS)
    assert np.abs(np.load(out / "samples.npy") - expected).max() < 1e-5


def test_a_report_shows_samples_next_to_conditions_and_real_images(run: Path) -> None:
    found = values(run / "report.html")  # that training wrote
    assert found["notes"] == [] and found["grids"] == []
    labels = [f"{n} network evaluation{'s' if n > 1 else ''}" for n in (1, 2, 4)]
    assert [strip["label"] for strip in found["strips"]] == ["conditioning images", *labels, "real images"]
    assert [each["label"] for each in found["beside"]] == ["conditioning images", "real images"]
    assert len(found["film"]) == 2 and len(found["levels"]["frames"]) > 5


def test_the_strips_show_the_pairs_of_the_data_set(run: Path) -> None:
    from udddm.tools.report import conditional

    model = udddm.load_model(run, device="cpu")
    given = conditional.chosen(model, ImageDataset(load_dataset(model.config.data)))
    assert given.seeds[0] == 0 and given.seeds[-1] == COUNT - 1 and len(given.seeds) == conditional.SHOWN
    rows = dict(conditional.rows(model, given))
    real = PIXELS[given.seeds] / 127.5 - 1
    assert np.allclose(rows["real images"], real, atol=1e-6)
    assert np.allclose(rows["conditioning images"], -real, atol=1e-6)
    drawn = model.sample(given.seeds, conditions=255 - PIXELS[given.seeds])
    assert np.array_equal(rows["1 network evaluation"].numpy(), drawn)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_draws_the_report(run: Path, tmp_path: Path) -> None:
    report.write([run], tmp_path / "index.html", device="cpu")
    page = tmp_path / "index.html"
    text = page.read_text().replace("img-src data:;", "img-src data:; connect-src 'self';")
    page.write_text(text)  # for the report of the test's own script
    script = """
    const strips = [...document.querySelectorAll(".strips img")];
    document.querySelectorAll("img").forEach((image) => image.decode());
    const captions = [...document.querySelectorAll(".strips figcaption, .beside figcaption")];
    report({ captions: captions.map((caption) => caption.textContent),
             widths: [...new Set(strips.map((image) => image.clientWidth))],
             wide: document.documentElement.scrollWidth > innerWidth });
    """
    for size in ("390,900", "1280,900"):
        found, console = run_page(tmp_path, script, size=size)
        assert console == [] and found is not None and "captions" in found, (found, console)
        assert found["captions"][0] == "conditioning images" and found["captions"][4:] == [
            "real images",
            "conditioning images of these samples",
            "real images of these samples",
        ]
        assert len(found["widths"]) == 1 and not found["wide"]


def test_a_release_has_conditions_samples_and_a_grid(run: Path, tmp_path: Path) -> None:
    lines = export.write(run, tmp_path / "out", "safetensors")
    assert any("contains 12 images of the data set" in line for line in lines)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"conditions.npy", "samples.npy", "grid.png", "README.md"} <= names
    given = np.load(tmp_path / "out" / "conditions.npy")
    seeds = [round(each) for each in np.linspace(0, COUNT - 1, 12)]
    drawn = udddm.sample(tmp_path / "out", seeds, conditions=given)
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), drawn)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "From the top: conditioning images" in card and 'numpy.load("FOLDER/conditions.npy")' in card
    assert all(str(run.parent).encode() not in path.read_bytes() for path in (tmp_path / "out").iterdir())
    export.write(run, tmp_path / "without", "hub", export.Options(data=False))
    assert "grid.png" not in {path.name for path in (tmp_path / "without").iterdir()}


def test_a_missing_partner_ends_training_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "photos", PIXELS)
    write(tmp_path / "sketches", PIXELS[:-2])
    pairs = ["data.condition.kind=pairs", f"data.condition.path={tmp_path / 'sketches'}"]
    command = ["train", str(tmp_path / "photos"), "--run-dir", str(tmp_path / "run"), "--device", "cpu", *pairs]
    assert main(command) != 0
    said = capsys.readouterr().err
    assert "sketches has no conditioning image for" in said and "photos/068.png and 1 other files" in said
    assert not (tmp_path / "run").exists()
