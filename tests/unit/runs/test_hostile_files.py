"""Arbitrary configurations, manifests and files of weights are read, or refused with an error meant for the user."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import udddm
from udddm.config import RunConfig, resolve
from udddm.config.text import parse
from udddm.errors import CheckpointError, ConfigError, StoreError
from udddm.runs import manifest
from udddm.runs.checkpoint import load_config, load_step
from udddm.runs.model import load_model
from udddm.runs.weights import Saved
from udddm.store.snapshot import read_header

FEW, MANY = settings(max_examples=30), settings(max_examples=80)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 0, 1e308, "../x", "os:system", "s3://k:s@b/x", "\ud800", "~", "1e5"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
LINES = [
    "train:",
    " steps: 1",
    " steps: [1",
    "{",
    "&a",
    "*a",
    "- ",
    "? ",
    "!!python/object:os.system x",
    "<<: *a",
    "\t",
]
GOOD = resolve({}).model_dump(mode="json")
PATHS = [(section, key) for section, keys in GOOD.items() if isinstance(keys, dict) for key in keys]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


def changed(value: Any, paths: list[tuple[str, str]], replaced: list[Any]) -> Any:
    tree = json.loads(json.dumps(value))
    for (section, key), new in zip(paths, replaced, strict=False):
        tree[section][key] = new
    return tree


@FEW
@given(st.lists(st.sampled_from(PATHS), min_size=1, max_size=3), st.lists(VALUES, min_size=1, max_size=3))
def test_any_configuration_is_valid_or_names_its_key(paths: list[tuple[str, str]], values: list[Any]) -> None:
    try:
        assert isinstance(resolve(changed(GOOD, paths, values)), RunConfig)
    except ConfigError as error:
        assert any(f"{section}" in str(error) for section, _ in paths)


@MANY
@given(st.text(max_size=60) | st.lists(st.sampled_from(LINES)).map("\n".join))
def test_any_text_is_a_configuration_or_one_error(text: str) -> None:
    with suppress(ConfigError):
        parse(text, "preset.yaml", RunConfig)


@MANY
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_is_read_or_refused(data: bytes) -> None:
    with suppress(ValueError):
        for name in manifest.parse(data):
            assert not name.startswith("/") and ".." not in name.split("/")


@MANY
@given(SCALARS | st.text(alphabet="./a\\~-", max_size=12), VALUES, VALUES)
def test_no_manifest_names_a_file_elsewhere(name: Any, size: Any, checksum: Any) -> None:
    entries = {str(name): {"bytes": size, "crc32c": checksum}}
    with suppress(ValueError):
        for found in manifest.parse(json.dumps(entries).encode()):
            assert not found.startswith(("/", "~")) and ".." not in found.split("/") and "\\" not in found


@MANY
@given(VALUES, st.sampled_from(["config.json", "position.json", "state/snapshot.json"]))
def test_any_json_file_of_a_checkpoint_is_read_or_refused(place: Path, value: Any, name: str) -> None:
    (place / "state").mkdir(exist_ok=True)
    (place / name).write_text(json.dumps(value))
    with suppress(CheckpointError, ConfigError, StoreError):
        if name == "config.json":
            load_config(place)
        elif name == "position.json":
            load_step(place)
        else:
            read_header(place / "state")


HEADERS = st.dictionaries(
    st.sampled_from(["weight", "__metadata__", "a/b"]) | st.text(max_size=4),
    VALUES
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BOOL", "XX", "F64"]) | SCALARS,
            "shape": st.lists(st.integers(-(2**64), 2**64), max_size=3) | SCALARS,
            "data_offsets": st.lists(st.integers(-(2**64), 2**64), max_size=3) | SCALARS,
        }
    ),
    max_size=3,
)


@MANY
@given(HEADERS, st.none() | st.integers(0, 2**64 - 1), st.binary(max_size=16))
def test_any_header_of_weights_is_read_or_refused(place: Path, header: Any, length: int | None, data: bytes) -> None:
    text = json.dumps(header).encode()
    (place / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    with suppress(CheckpointError):
        for tensor in (saved := Saved(place, "model")).values():
            assert tensor.nbytes <= len(data)
        saved.check_network({"weight": torch.Size([1])})


@MANY
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_any_damaged_file_of_weights_is_read_or_refused(place: Path, at: int, data: bytes) -> None:
    path = place / "intact.safetensors"
    if not path.exists():
        save_file({"weight": torch.arange(6.0), "bias": torch.arange(3)}, path)
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(data)] = data
    (place / "damaged.safetensors").write_bytes(content)
    with suppress(CheckpointError):
        dict(Saved(place, "damaged"))
    shutil.rmtree(place / "state", ignore_errors=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("network.base_channels", 1 << 16, "belongs to a different network"),  # 10 TB
        ("network.classes", 1 << 24, "belongs to a different network"),
        ("network.base_channels", 10**12, "network.base_channels: Input should be less than or equal to"),
        ("network.blocks_per_level", 10**9, "network.blocks_per_level"),
        ("network.channel_mult", [1] * 10**4, "network.channel_mult"),
        ("schedule.rho", 1e-300, "schedule.rho"),
        ("schedule.sigma_max", 1e308, "schedule.sigma_max"),
    ],
)
def test_the_size_of_a_strangers_network_is_checked_before_memory_is_allocated(
    place: Path, trained: Path, key: str, value: Any, message: str
) -> None:
    checkpoint = place / "stranger"
    shutil.copytree(trained, checkpoint, dirs_exist_ok=True)
    (checkpoint / "manifest.json").unlink()
    content = json.loads((checkpoint / "config.json").read_text())
    section, leaf = key.split(".")
    content["config"][section][leaf] = value
    (checkpoint / "config.json").write_text(json.dumps(content))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_model(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    network = {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []}
    settings = {"network": network, "train": {"steps": 1, "batch_size": 8}, "sample": {"every_steps": 0, "final": 0}}
    udddm.train(settings, np.zeros((8, 1, 8, 8), np.uint8), run_dir=place / "run", device="cpu")
    return place / "run" / "checkpoints" / "step-00000001"
