"""`udddm sample` with images that are given: files in, files out, and one error for what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from udddm.cli.main import main
from udddm.testing.models import random_model, saved

SIDE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `gray`, `rgb`, `masked` and `colored`, and images for them."""
    place = tmp_path_factory.mktemp("tasks")
    plain, condition = "network.classes=0", "network.condition=channels"
    saved(random_model(plain), place / "gray")
    saved(random_model(plain, shape=(3, 8, 8)), place / "rgb")
    saved(random_model(plain, condition, "data.condition.kind=mask"), place / "masked")
    saved(random_model(plain, condition, "data.condition.kind=gray", shape=(3, 8, 8)), place / "colored")
    (place / "folder").mkdir()
    for number, image in enumerate(PIXELS):
        Image.fromarray(image).save(place / "folder" / f"{number}.png")
        Image.fromarray(image[:, :, 0]).save(place / f"gray{number}.png")
    Image.fromarray(PIXELS[0, :2, :2]).save(place / "small.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[3:, 2:6] = 255
    Image.fromarray(mask).save(place / "mask.png")
    Image.fromarray(mask[1:]).save(place / "other-mask.png")
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    np.save(place / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    return place


@pytest.fixture
def sample(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Run `udddm sample` in `place` with the words of a text; returns the folder of its files."""
    monkeypatch.chdir(place)

    def run(words: str) -> Path:
        assert main(["sample", *words.split(), "--out", str(tmp_path), "--save", "npy,png", "--device", "cpu"]) == 0
        return tmp_path

    return run


@pytest.mark.parametrize("mask", ["mask.png", "2,3,4,5"])
def test_inpainting_writes_the_known_pixels_of_the_file(sample: Callable[[str], Path], mask: str) -> None:
    out = sample(f"rgb --edit inpaint --input folder --mask {mask} --steps 3")
    for number, image in enumerate(PIXELS):
        written = np.asarray(Image.open(out / f"{number:06d}.png"))
        changed = (written != image).any(2)
        assert changed[3:, 2:6].mean() > 0.9 and changed.sum() == changed[3:, 2:6].sum()


def test_one_image_has_as_many_variants_as_seeds(sample: Callable[[str], Path]) -> None:
    images = np.load(
        sample("gray --edit inpaint --input gray0.png --mask mask.png --seeds 4,7 --steps 2") / "samples.npy"
    )
    assert len(images) == 2 and not np.array_equal(*images)
    assert np.array_equal(images[0][:, :3], images[1][:, :3])


def test_the_other_edits(sample: Callable[[str], Path]) -> None:
    images = np.load(sample("rgb --edit upscale --factor 4 --input small.png --steps 2") / "samples.npy")
    means = images[0].reshape(3, 2, 4, 2, 4).mean((2, 4))
    assert np.allclose(means.transpose(1, 2, 0), PIXELS[0, :2, :2] / 127.5 - 1, atol=1e-5)
    images = np.load(sample("rgb --edit colorize --input gray1.png --steps 2") / "samples.npy")
    luma = np.einsum("c,chw->hw", [0.299, 0.587, 0.114], images[0])
    assert np.allclose(luma, PIXELS[1, :, :, 0] / 127.5 - 1, atol=1e-5)
    assert np.load(sample("rgb --edit stroke --input folder --sigma 1 --steps 2") / "samples.npy").shape == (3, 3, 8, 8)
    between = np.load(sample("gray --edit interpolate --between 5,9 --count 4 --batch 4") / "samples.npy")
    ends = np.load(sample("gray --seeds 5,9 --batch 4") / "samples.npy")
    assert len(between) == 4 and np.array_equal(between[[0, 3]], ends)


def test_conditions_are_files_too(sample: Callable[[str], Path]) -> None:
    images = np.load(sample("colored --condition gray0.png --count 2 --batch 2") / "samples.npy")
    others = np.load(sample("colored --condition gray1.png --count 2 --batch 2") / "samples.npy")
    assert images.shape == (2, 3, 8, 8) and not np.array_equal(images, others)
    hidden = [
        np.load(sample(f"masked --condition gray0.png --mask {box} --batch 2") / "samples.npy")
        for box in ("0,0,4,4", "1,0,4,4")
    ]
    assert hidden[0].shape == (1, 1, 8, 8) and not np.array_equal(*hidden)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gray --edit inpaint --input gray0.png", "--edit inpaint needs --mask"),
        ("gray --edit upscale --factor 2", "--edit upscale needs --input"),
        ("gray --edit interpolate", "--edit interpolate needs --between"),
        ("gray --edit interpolate --between 3", "--between takes two seeds"),
        ("gray --factor 2", "--factor is for --edit upscale"),
        ("gray --edit stroke --input gray0.png --mask mask.png", "--mask is for --edit inpaint"),
        ("gray --edit stroke --input gray0.png --sampler heun", "--sampler has no effect with --edit stroke"),
        ("gray --edit stroke --input gray0.png --condition gray0.png", "give one of them"),
        ("gray --edit interpolate --between 3,4 --seeds 1", "the two seeds are those of --between"),
    ],
)
def test_options_that_do_not_fit_are_one_error(
    sample: Callable[[str], Path], capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sample(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gray --edit inpaint --input gray0.png --mask other-mask.png", "other-mask.png has 8x7 pixels"),
        ("gray --edit inpaint --input gray0.png --mask 5,0,4,1", "is not inside of 8x8 pixels"),
        ("gray --edit inpaint --input gray0.png --mask 5,0,0,1", "marks no pixel"),
        ("gray --edit inpaint --input gray0.png --mask 1,2", "give an existing image file, or a rectangle"),
        ("gray --edit inpaint --input small.png --mask mask.png", "small.png has 2x2 pixels"),
        ("gray --edit upscale --factor 3 --input small.png", "factor 3: it must be at least 2 and divide 8x8"),
        ("gray --edit colorize --input gray0.png", "colorize needs a model of RGB images"),
        ("gray --edit stroke --input broken.png", "cannot read broken.png as an image"),
        ("gray --edit stroke --input pickle.npy", "cannot read pickle.npy: Object arrays cannot be loaded"),
        ("rgb --edit stroke --input folder --count 2", "images: give 1 or 2 images"),
        ("rgb --edit stroke --input nowhere.png", "nowhere.png does not exist"),
        ("gray --condition gray0.png", "trained without data.condition"),
        ("colored --edit stroke --input folder", "conditioned on images"),
        ("colored", "conditioned on images (data.condition.kind=gray): give one for each seed"),
        ("colored --condition gray0.png --mask mask.png", "--mask has no effect: data.condition.kind is gray"),
        ("masked --condition gray0.png", "give that part with --mask"),
    ],
)
def test_files_that_do_not_fit_are_one_error(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(place)
    assert main(["sample", *words.split(), "--out", str(tmp_path / "out"), "--device", "cpu"]) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
