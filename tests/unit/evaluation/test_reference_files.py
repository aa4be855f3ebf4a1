"""Files of reference statistics: EDM's and guided-diffusion's formats, and what is refused."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm.data import ImageDataset
from udddm.errors import ConfigError, DataError
from udddm.evaluation import evaluate, metrics
from udddm.evaluation.features import FeatureNetwork
from udddm.evaluation.reference import read_reference

NETWORK = FeatureNetwork("first pixels", lambda batch: batch.flatten(1)[:, :6], torch.device("cpu"))
SHAPE = (3, 6, 6)


def statistics(size: int = 6) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(0).normal(size=(50, size))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def pictures(count: int = 40, side: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_statistics_in_edms_format(tmp_path: Path) -> None:
    given = statistics()
    file = read_reference(saved(tmp_path / "r.npz", **given))
    real = evaluate.reference_of(file, NETWORK, SHAPE, tmp_path)
    assert np.array_equal(real.mean, given["mu"]) and np.array_equal(real.covariance, given["sigma"])
    with pytest.raises(ConfigError, match="needs features of the reference"):
        _ = real.probe
    single = {name: values.astype(np.float32) for name, values in given.items()}
    again = evaluate.reference_of(read_reference(saved(tmp_path / "s.npz", **single)), NETWORK, SHAPE, tmp_path)
    assert again.mean.dtype == np.float64 and np.allclose(again.covariance, real.covariance, atol=1e-6)


def test_images_in_guided_diffusions_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = pictures()
    expected = evaluate.reference(ImageDataset(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), NETWORK, tmp_path)
    file = read_reference(saved(tmp_path / "r.npz", arr_0=images))
    found = evaluate.reference_of(file, NETWORK, SHAPE, tmp_path)
    assert np.array_equal(found.mean, expected.mean) and np.array_equal(found.probe, expected.probe)
    # With statistics, which are those of more images, these are used; and images for what needs features.
    both = saved(tmp_path / "b.npz", arr_0=images, mu_s=np.zeros(3), sigma_s=np.eye(3), **statistics())
    found = evaluate.reference_of(read_reference(both), NETWORK, SHAPE, tmp_path)
    assert np.array_equal(found.mean, statistics()["mu"]) and np.array_equal(found.probe, expected.probe)
    assert "mu_s, sigma_s not used" in caplog.text
    # Statistics of another network: everything is computed from the images.
    other = saved(tmp_path / "o.npz", arr_0=images, **statistics(9))
    found = evaluate.reference_of(read_reference(other), NETWORK, SHAPE, tmp_path)
    assert np.array_equal(found.mean, expected.mean)


def test_metrics_that_need_features_are_left_out_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moments = read_reference(saved(tmp_path / "m.npz", **statistics()))
    images = read_reference(saved(tmp_path / "i.npz", arr_0=pictures()))
    assert evaluate.applicable(None, moments) == ["frechet", "spread", "inception-score"]
    assert "kid, precision-recall" in caplog.text
    assert evaluate.applicable(["frechet"], moments) == ["frechet"]
    with pytest.raises(ConfigError, match=r"kid need features .*m\.npz"):
        evaluate.applicable(["frechet", "kid"], moments)
    assert "kid" in evaluate.applicable(None, images) and "kid" in evaluate.applicable(["kid"], None)
    # Every metric of the package that can be computed from moments is, and no other one.
    features = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    real = evaluate.reference_of(moments, NETWORK, SHAPE, tmp_path)
    found = evaluate.score(features, None, real, "first pixels", evaluate.applicable(None, moments, quiet=True))
    assert found["fd"] == pytest.approx(metrics.frechet(metrics.moments(features), real.moments))
    for name in metrics.NEED_FEATURES:
        with pytest.raises(ConfigError, match="needs features of the reference"):
            evaluate.score(features, None, real, "first pixels", [name])


def test_statistics_of_other_networks_and_sizes_are_refused(tmp_path: Path) -> None:
    file = read_reference(saved(tmp_path / "m.npz", **statistics(9)))
    with pytest.raises(DataError, match=r"m\.npz has statistics of 9 features, .*first pixels has 6"):
        evaluate.check_reference(file, NETWORK, SHAPE)
    file = read_reference(saved(tmp_path / "i.npz", arr_0=pictures(side=8)))
    with pytest.raises(DataError, match="images of 3x8x8, and the samples are 3x6x6"):
        evaluate.check_reference(file, NETWORK, SHAPE)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def broken(**changes: Any) -> dict[str, Any]:
    given = {**statistics(), **changes}
    return {name: values for name, values in given.items() if values is not None}


def with_value(name: str, value: float) -> dict[str, Any]:
    given = statistics()
    given[name].flat[1] = value
    return given


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (broken(mu=np.array([Evil()] * 6)), "mu contains pickled objects"),
        ({"arr_0": np.array([Evil()])}, "arr_0 contains pickled objects"),
        (with_value("mu", np.nan), "mu has values that are not finite"),
        (with_value("sigma", np.inf), "sigma has values that are not finite"),
        (with_value("sigma", 5.0), "sigma is not a covariance"),
        (broken(sigma=-np.eye(6)), "sigma is not a covariance"),
        (broken(sigma=np.eye(5)), r"sigma is \[5, 5\], expected \[6, 6\]"),
        (broken(sigma=None), "has no sigma"),
        (broken(mu=None), "has no mu"),
        (broken(mu=np.zeros((6, 1))), "mu is float64 .*expected floats with 1 axes"),
        (broken(mu=np.zeros(6, np.int64)), "mu is int64"),
        (broken(mu=np.zeros(0), sigma=np.zeros((0, 0))), "sigma is"),
        (broken(mu=np.zeros(metrics.KERNEL * 2)), "larger than"),
        ({"arr_0": np.zeros((4, 4, 4, 3), np.float32)}, "arr_0 is float32"),
        ({"images": pictures()}, "has images: expected mu and sigma"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        read_reference(saved(tmp_path / "r.npz", **arrays))
    assert "r.npz" in str(error.value) and not (tmp_path / "executed").exists()


def test_an_array_that_announces_more_than_the_file_has_is_not_allocated(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (16_000, 16_000)})
    saved(tmp_path / "r.npz", mu=np.zeros(16_000))
    with zipfile.ZipFile(tmp_path / "r.npz", "a") as archive:
        archive.writestr("sigma.npy", header.getvalue() + bytes(8))
    with pytest.raises(DataError, match=r"sigma \[16000, 16000\] is larger than the file"):
        read_reference(tmp_path / "r.npz")


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.npz").write_bytes(b"PK\x03\x04 damaged")
    (tmp_path / "r.pkl").write_bytes(b"\x80\x04.")
    for name, words in (("r.npz", "cannot read"), ("r.pkl", "A pickle can execute code"), ("x.npz", "does not exist")):
        with pytest.raises(DataError, match=words):
            read_reference(tmp_path / name)


def test_the_ratio_to_held_out_images_is_one_for_real_images() -> None:
    rows = np.random.default_rng(0).normal(size=(8000, 32)).astype(np.float32)
    real = metrics.Reference(*metrics.moments(rows[:4000]), None)
    found = evaluate.held_out(rows[4000:6000], rows[6000:], real)
    assert found["fd_ratio"] == pytest.approx(1, abs=0.1) and 0 < found["fd_held_out"] < 1
    assert evaluate.held_out(rows[4000:6000] + 1, rows[6000:], real)["fd_ratio"] > 30
    # The distance decreases with the number of images: as many are used on both sides.
    few = evaluate.held_out(rows[4000:4050], rows[6000:], real)
    assert few["fd_held_out"] == pytest.approx(metrics.frechet(metrics.moments(rows[6000:6050]), real.moments))
