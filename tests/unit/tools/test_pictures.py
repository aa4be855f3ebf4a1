"""The files of `udddm sample`, and the film of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from udddm.config import DataConfig
from udddm.data import load_dataset
from udddm.errors import ConfigError
from udddm.runs.run import Run
from udddm.tools import pictures


def images(channels: int, count: int = 5) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).uniform(-1.2, 1.2, (count, channels, 6, 4)).astype(np.float32)


def pixels(drawn: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.rint((drawn.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_each_seed_has_a_file_of_its_pixels(tmp_path: Path, channels: int, mode: str) -> None:
    drawn, seeds = images(channels), [3, 0, 12, 7, 1234567]
    told = pictures.save(tmp_path, drawn, seeds, None, ["png"])
    assert told == [f"5 PNG files in {tmp_path}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{seed:07d}.png" for seed in seeds)
    for seed, expected in zip(seeds, pixels(drawn), strict=True):
        with Image.open(tmp_path / f"{seed:07d}.png") as image:
            assert image.mode == mode
            assert np.array_equal(np.asarray(image).reshape(expected.shape), expected)


def test_the_files_of_seeds_are_a_data_set(tmp_path: Path) -> None:
    drawn = images(3)
    pictures.save(tmp_path, drawn, range(5), None, ["png"])
    data = load_dataset(DataConfig(name="folder", path=str(tmp_path)))
    assert len(data) == 5
    read = np.stack([np.asarray(data[i]) for i in range(5)])
    assert read.dtype == np.uint8 and np.array_equal(read.transpose(0, 2, 3, 1), pixels(drawn))


def test_the_npz_file_is_as_of_other_tools(tmp_path: Path) -> None:
    drawn = images(3)
    pictures.save(tmp_path, drawn, range(5), [4, 3, 2, 1, 0], ["npz"])
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], pixels(drawn))
        assert file["arr_1"].tolist() == [4, 3, 2, 1, 0]
    pictures.save(tmp_path, drawn, range(5), None, ["npz"])
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]


def test_images_that_no_png_holds_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images of 5 channels are no PNG files: use --save npy or npz"):
        pictures.save(tmp_path / "out", images(5), range(5), None, ["npy", "png"])
    assert not (tmp_path / "out").exists()


def test_the_film_has_the_pictures_of_training_in_order(tmp_path: Path) -> None:
    for step, level in ((200, 1.0), (30, -1.0), (1000, 0.0)):
        (tmp_path / "samples").mkdir(exist_ok=True)
        drawn = np.full((1, 1, 8, 8), level, np.float32)
        pictures.save(tmp_path / "one", drawn, [0], None, ["grid"])
        (tmp_path / "one" / "samples.png").rename(tmp_path / "samples" / f"step-{step:08d}.png")
    assert pictures.film(Run(tmp_path), tmp_path / "out" / "film.gif") == 3
    with Image.open(tmp_path / "out" / "film.gif") as film:
        shown = []
        for frame in range(film.n_frames):
            film.seek(frame)
            shown.append(np.asarray(film.convert("L"))[30, 30])
    assert shown == [0, 255, 128]


def test_a_run_without_pictures_has_no_film(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no pictures of training in samples/ \(sample.every_steps\)"):
        pictures.film(Run(tmp_path), tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []
