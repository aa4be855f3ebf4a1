"""Inception and DINOv2: features of the reference implementations, and weights that are verified and not executed."""

from __future__ import annotations

import http.server
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm.errors import ConfigError, DataError
from udddm.evaluation import weights
from udddm.evaluation.features import FeatureNetwork, load_features, to_pixels
from udddm.evaluation.inception import resize_bilinear
from udddm.evaluation.weights import Published, locate
from udddm.testing.features import random_dinov2, random_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    return path, random_inception(path)


@pytest.fixture(scope="module")
def inception(file: tuple[Path, str]) -> FeatureNetwork:
    return load_features("inception", CPU, {"inception": f"{file[0]}#sha256={file[1]}"})


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories of downloads that have nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def pixels(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


def images(given: torch.Tensor) -> torch.Tensor:
    return given.float() / 127.5 - 1


def test_features_are_those_of_torch_fidelity(inception: FeatureNetwork) -> None:
    """The values are torch-fidelity 0.4.0's with the same weights (benchmarks/quality/fid_tools.py --constants)."""
    for size, expected in TORCH_FIDELITY.items():
        features, logits = inception(images(pixels(1, 3, *size)))
        assert logits is not None and features.shape == (1, 2048) and logits.shape == (1, 1008)
        found = [features.mean(), features.std(), features[0, 0], logits[0, 0]]
        assert found == pytest.approx(expected, rel=1e-4)


def test_gray_images_are_repeated_and_values_rounded_to_256_levels(inception: FeatureNetwork) -> None:
    gray = images(pixels(2, 1, 12, 12))
    expected, _ = inception(gray)
    assert np.array_equal(inception(gray.expand(-1, 3, -1, -1))[0], expected)
    assert np.array_equal(inception(gray + 0.45 / 127.5)[0], expected)
    assert not np.array_equal(inception(gray + 0.55 / 127.5)[0], expected)


def test_values_are_rounded_as_edm_rounds_them() -> None:
    """EDM truncates x * 127.5 + 128. Only values halfway between two levels differ."""
    values = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    theirs = (values.double() * 127.5 + 128).clamp(0, 255).byte()
    assert torch.equal(to_pixels(values.clamp(-1, 1)), theirs)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_pixels(images(levels))[:, :1], levels)


def test_images_are_resized_as_in_tensorflow_1() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4)
    # Positions are i * 4 / 8, without a shift by half a pixel; beyond the last pixel, it is repeated.
    assert resize_bilinear(ramp, 1, 8).flatten().tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resize_bilinear(ramp, 1, 2).flatten().tolist() == [0, 2]  # no low-pass filter
    image = pixels(1, 3, 299, 299).float()
    assert torch.equal(resize_bilinear(image, 299, 299), image)


def test_dinov2_features_are_those_of_its_authors_code(tmp_path: Path) -> None:
    """The values are of facebookresearch/dinov2's vision_transformer.py with the same weights and resized images."""
    digest = random_dinov2(tmp_path / "dinov2.pth")
    network = load_features("dinov2", CPU, {"dinov2": f"{tmp_path / 'dinov2.pth'}#sha256={digest}"})
    features, logits = network(images(pixels(2, 3, 32, 32)))
    assert logits is None and features.shape == (2, 128)
    assert [features.mean(), features.std(), *features[:, 0]] == pytest.approx(DINOV2_AUTHORS, rel=1e-4)


def test_other_weights_have_another_name_and_other_statistics(tmp_path: Path, inception: FeatureNetwork) -> None:
    digest = random_inception(tmp_path / "b.pth", seed=1)
    other = load_features("inception", CPU, {"inception": f"{tmp_path / 'b.pth'}#sha256={digest.upper()}"})
    assert other.name == f"inception#{digest[:8]}" != inception.name
    assert other.fingerprint((3, 8, 8)) != inception.fingerprint((3, 8, 8))


def test_a_file_with_another_checksum_is_refused_with_what_to_write(file: tuple[Path, str]) -> None:
    path, digest = file
    with pytest.raises(ConfigError, match=f"published weights have {weights.INCEPTION.sha256}.*#sha256={digest}"):
        load_features("inception", CPU, {"inception": str(path)})
    with pytest.raises(ConfigError, match=f"has the SHA-256 {digest}, and you gave {'0' * 64}"):
        locate(weights.INCEPTION, f"{path}#sha256={'0' * 64}")
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        locate(weights.INCEPTION, f"{path}#sha256=123")


def test_without_weights_the_error_says_where_to_put_them(caches: Path) -> None:
    unreachable = Published("inception", "http://127.0.0.1:1/inception.pth", "0" * 64, ("inception.pth",))
    with pytest.raises(ConfigError) as error:
        locate(unreachable)
    for word in ("127.0.0.1:1", f"{caches}/cache/udddm/weights/inception.pth", "--inception-weights FILE"):
        assert word in str(error.value)
    with pytest.raises(ConfigError, match=r"nowhere\.pth does not exist.*put it at"):
        locate(unreachable, str(caches / "nowhere.pth"))


@pytest.mark.parametrize("place", ["cache/udddm/weights", "hub/checkpoints"])
def test_weights_of_other_programs_are_found(
    caches: Path, place: str, file: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    known = Published("inception", "http://127.0.0.1:1/x", file[1], ("a.pth", "b.pth"))
    (caches / place).mkdir(parents=True)
    (caches / place / "a.pth").write_bytes(b"an interrupted download")
    (caches / place / "b.pth").symlink_to(file[0])
    assert locate(known) == (caches / place / "b.pth", file[1])
    assert "a.pth is not used" in caplog.text


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(_Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_download_is_kept_only_with_its_checksum(tmp_path: Path, server: str) -> None:
    (tmp_path / "served").mkdir()
    digest = random_dinov2(tmp_path / "served" / "d.pth")
    path, found = locate(weights.DINOV2, f"{server}/d.pth#sha256={digest}")
    assert found == digest and path.read_bytes() == (tmp_path / "served" / "d.pth").read_bytes()
    (tmp_path / "served" / "d.pth").unlink()
    assert locate(weights.DINOV2, f"{server}/d.pth#sha256={digest}")[0] == path  # not downloaded twice
    (tmp_path / "served" / "e.pth").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="SHA-256"):
        locate(weights.DINOV2, f"{server}/e.pth#sha256={digest}")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": Evil()}, "Nothing in it was executed"),
        ({"fc.weight": torch.zeros(3)}, "weights of another network"),
        ([torch.zeros(3)], "not a state dict"),
        (None, "cannot read"),
    ],
)
def test_what_are_no_weights_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    torch.save(content, path) if content is not None else path.write_bytes(b"\x00not a file of PyTorch")
    for name in ("inception", "dinov2"):
        with pytest.raises(ConfigError, match=words):
            load_features(name, CPU, {name: f"{path}#sha256={weights.sha256_of(path)}"})
    assert not (tmp_path / "executed").exists()


def test_files_in_the_format_of_early_versions_of_pytorch_are_read(tmp_path: Path) -> None:
    digest = random_dinov2(tmp_path / "new.pth")
    tensors = torch.load(tmp_path / "new.pth", weights_only=True)
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = weights.sha256_of(tmp_path / "old.pth")
    given = {"new": digest, "old": old}
    rows = [
        load_features("dinov2", CPU, {"dinov2": f"{tmp_path / name}.pth#sha256={value}"})(images(pixels(1, 3, 8, 8)))[0]
        for name, value in given.items()
    ]
    assert old != digest and np.array_equal(*rows)


def test_damaged_values_are_refused(file: tuple[Path, str], tmp_path: Path) -> None:
    tensors = torch.load(file[0], weights_only=True)
    tensors["Mixed_6a.branch3x3.conv.weight"][0, 0, 0, 0] = torch.nan
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=re.escape("Mixed_6a.branch3x3.conv.weight has values that are not finite")):
        load_features(
            "inception", CPU, {"inception": f"{tmp_path}/w.pth#sha256={weights.sha256_of(tmp_path / 'w.pth')}"}
        )


def test_images_and_features_that_are_not_finite_are_refused() -> None:
    network = FeatureNetwork("mine", lambda batch: 1 / batch.flatten(1).sum(1, keepdim=True), CPU)
    bad = torch.ones(3, 1, 2, 2)
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="image 1 of a batch"):
        network(bad)
    with pytest.raises(ConfigError, match="mine returned features that are not finite"):
        network(torch.zeros(2, 1, 2, 2))


# (mean, deviation, first feature, first logit) of one image, by its size
TORCH_FIDELITY = {
    (8, 8): (3.845845, 5.378836, 5.540191, 16.54451),
    (32, 32): (6.148159, 8.597923, 10.38473, 25.71174),
    (299, 299): (10.83837, 15.1678, 19.8048, 43.25524),
    (330, 400): (7.089463, 9.912578, 12.35595, 28.66973),
}
# mean and deviation of the features of two images, and the first feature of each
DINOV2_AUTHORS = [-0.006484498, 1.01404, -2.232129, -2.049202]
