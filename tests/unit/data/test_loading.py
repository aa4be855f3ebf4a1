"""Loading the data set of a configuration: built-in names, users' factories, and errors in both."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udddm.config import DataConfig, ExpectConfig, RunConfig
from udddm.data import ImageDataset, expected, load_dataset
from udddm.errors import ConfigError, DataError

MODULE = """
import numpy as np

class Namespace:
    @staticmethod
    def build(n=3):
        return np.zeros((n, 1, 4, 4), np.uint8)

build = Namespace.build
count = 5

def stream():
    return iter([])

def fail():
    raise RuntimeError("the disk is on fire")

def mapping():
    return {"train": [1]}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_data.py").write_text(MODULE)
    (tmp_path / "their_broken.py").write_text("import no_such_dependency")
    (tmp_path / "their_circle.py").write_text("from their_data import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("their_data", "their_broken", "their_circle"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "their_data"


def load(name: str, **settings: Any) -> Any:
    return load_dataset(DataConfig(name=name, **settings))


def test_a_users_function_is_called_with_the_arguments(module: str) -> None:
    assert len(ImageDataset(load("their_data:build"))) == 3
    assert len(ImageDataset(load("their_data:build", arguments={"n": 7}))) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "there is no module no_such_module: .*PYTHONPATH"),
        ("their_data.deeper:f", "importing their_data.deeper failed|there is no module their_data.deeper"),
        ("their_broken:f", "importing their_broken failed: No module named 'no_such_dependency'"),
        ("their_circle:f", "importing their_circle failed: cannot import name 'no_such_name'"),
        ("their_data:bild", "has no bild; did you mean build"),
        ("their_data:count", "is a int, not a function"),
        ("their_data:Namespace.build", "write package.module:function"),
        (":f", "write package.module:function"),
        ("their_data:", "write package.module:function"),
        (".relative:f", "write package.module:function"),
    ],
)
def test_a_factory_that_cannot_be_loaded_is_a_configuration_error(module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("their_data:build", {"m": 1}, "does not accept data.arguments: got an unexpected keyword argument 'm'"),
        ("their_data:stream", {}, "the return value of their_data:stream is a list_iterator without __len__"),
        ("their_data:mapping", {}, "the return value of their_data:mapping is a dict"),
    ],
)
def test_a_wrong_factory_is_reported(module: str, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        load(name, arguments=arguments)


def test_an_error_inside_a_factory_keeps_its_type(module: str) -> None:
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        load("their_data:fail")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnist", "did you mean fashion-mnist?"),
        ("cifar-10", "did you mean cifar10?"),
        (
            "imagenet",
            "unknown data set 'imagenet'.*digits, fashion-mnist, cifar10, folder, zip, .*, array, and package.module",
        ),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("digits", {"path": "x"}, r"digits: to train on x, set data\.name=folder \(image files\) or data\.name=array"),
        ("digits", {"size": 8}, r"data\.size does not apply.*: set data\.name=folder, zip, .*, or remove data\.size"),
        ("cifar10", {"size": 8}, r"data\.size does not apply"),
        ("folder", {"path": "x", "label": "cls"}, r"data\.label does not apply.*: set data\.name=webdataset, hugging"),
        ("zip", {"path": "x", "image": "png"}, r"data\.image does not apply"),
        ("webdataset", {"path": "x", "split": "test"}, r"data\.split does not apply.*: set data\.name=huggingface, or"),
        ("a.b:c", {"image": "png"}, r"data\.image does not apply.*move it to data\.arguments"),
        ("array", {"path": "x.npy", "arguments": {"a": 1}}, r"set data\.name=package\.module:function, or remove"),
        ("a.b:c", {"path": "x"}, "data.path does not apply to the data set a.b:c: move it to data.arguments"),
        ("folder", {}, "needs data.path"),
        ("array", {}, "needs data.path"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name, **settings)


def test_a_torch_data_set_is_map_style() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    dataset = ImageDataset(torch.utils.data.TensorDataset(pixels, torch.arange(5)))
    images, labels = dataset.batch(np.array([4, 1]))
    assert torch.equal(images, pixels[[4, 1]].float() / 127.5 - 1)
    assert labels is not None and labels.tolist() == [4, 1]


def test_importing_the_data_package_is_fast() -> None:
    heavy = "{'zarr', 'PIL', 'torchvision', 'fsspec'}"
    code = f"import sys, udddm.data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def arrays(path: Path, labels: list[int] | None = None) -> str:
    images = np.zeros((4, 1, 4, 4), np.uint8)
    np.savez(path / "data.npz", **({"images": images} if labels is None else {"images": images, "labels": labels}))
    return str(path / "data.npz")


@pytest.mark.parametrize(
    ("labels", "expect", "message"),
    [
        (None, {"samples": 5, "shape": (1, 4, 4)}, "has 4 samples, not 5"),
        (None, {"samples": 4, "shape": (3, 4, 4)}, "images are 1x4x4, not 3x4x4"),
        (None, {"samples": 4, "shape": (1, 4, 4), "classes": 2}, "no labels, not 2 classes"),
        ([0, 1, 2, 0], {"samples": 4, "shape": (1, 4, 4), "classes": 2}, "has 3 classes, not 2"),
    ],
)
def test_unexpected_data_are_refused_with_both_values(
    tmp_path: Path, labels: list[int] | None, expect: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"data.expect.*{message}.*data.path"):
        load("array", path=arrays(tmp_path, labels), expect=ExpectConfig(**expect))


@pytest.mark.parametrize(("labels", "classes"), [(None, None), ([0, 1, 2, 0], None), ([0, 1, 2, 0], 3)])
def test_expected_data_are_loaded(tmp_path: Path, labels: list[int] | None, classes: int | None) -> None:
    expect = ExpectConfig(samples=4, shape=(1, 4, 4), classes=classes)
    assert len(load("array", path=arrays(tmp_path, labels), expect=expect)) == 4


def test_data_expect_is_not_in_the_fingerprint() -> None:
    expect = ExpectConfig(samples=4, shape=(1, 4, 4))
    assert RunConfig(data=DataConfig(expect=expect)).fingerprint() == RunConfig().fingerprint()


def test_the_expected_contents_of_the_digits_are_correct() -> None:
    known, images = expected(DataConfig(name="digits")), ImageDataset(load("digits"))
    assert known == ExpectConfig(samples=len(images), shape=images.shape, classes=images.classes)
    assert expected(DataConfig(name="folder", path="x")) is None
