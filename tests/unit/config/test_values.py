"""The meaning of values in presets and overrides, and ambiguous values, which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from udddm.config import as_yaml, load_config
from udddm.config.reading import apply
from udddm.errors import ConfigError

PRESET = """\
data: {name: digits}
train: {steps: 4, batch_size: 16, learning_rate: 1e-3, ema: [0.9]}
order: {lanes: 8}
"""


def preset(path: Path, text: str = PRESET) -> Path:
    (path / "preset.yaml").write_text(text)
    return path / "preset.yaml"


@pytest.mark.parametrize(
    "text",
    [
        "/data/a #2",
        "&x",
        "/d/a\nb",
        "2024-01-01",
        "123",
        "1e5",
        "nan",
        "*.npy",
        "@x",
        "no",
        "010",
        "1:30",
        "a: b",
        "[a",
    ],
)
def test_text_is_read_literally(text: str) -> None:
    assert load_config(None, [f"data.path={text}"]).data.path == text


def test_null_and_quotes_of_an_override() -> None:
    assert load_config(None, ["data.path=x", "data.path=null"]).data.path is None
    assert load_config(None, ["data.path=x", "data.path="]).data.path is None
    assert load_config(None, ["data.path='null'"]).data.path == "null"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12345e67", "12345e67"),
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("-3", -3),
        ("010", 10),
        ("0x10", 16),
        ("1_000", 1000),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("'5'", "5"),
        ("a #2", "a #2"),
        ("@x", "@x"),
        ("[1e-4, a, {b: 010}]", [1e-4, "a", {"b": 10}]),
    ],
)
def test_values_of_free_mappings_are_numbers_only_if_unambiguous(tmp_path: Path, text: str, value: Any) -> None:
    found = load_config(None, ["data.name=a:b", f"data.arguments.x={text}"]).data.arguments["x"]
    assert (found, type(found)) == (value, type(value))
    if "#" not in text and "@" not in text:  # which YAML itself interprets in a file
        path = preset(tmp_path, f"data: {{name: 'a:b', arguments: {{x: {text}}}}}\n")
        assert load_config(path).data.arguments["x"] == value


@pytest.mark.parametrize(
    "value",
    [
        "1e-4",
        "12",
        "no",
        "a #2",
        "~",
        "x: y",
        1e-8,
        1e16,
        [1, "2"],
        {"a": "1e+5"},
        None,
        True,
        "true",
        "'q'",
        "a\nb",
        "",
    ],
)
def test_a_value_of_a_dict_of_overrides_arrives_unchanged(value: Any) -> None:
    tree: dict[str, Any] = {}
    apply(tree, f"data.arguments.x={as_yaml(value)}")
    assert tree["data"]["arguments"]["x"] == value


def test_numbers_in_a_preset(tmp_path: Path) -> None:
    text = (
        "seed: 010\ntrain: {steps: 1e5, learning_rate: 1e-4, ema_warmup: yes, compile: off}\ndata: {path: 2024-01-01}\n"
    )
    config = load_config(preset(tmp_path, text))
    assert (config.seed, config.train.steps, config.train.learning_rate) == (10, 100_000, 1e-4)
    assert (config.train.ema_warmup, config.train.compile, config.data.path) == (True, False, "2024-01-01")


def test_a_resolved_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    config = load_config(None, ["data.name=a:b", "data.arguments.x='1e-4'", "data.arguments.y=no", "data.path=5"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": "12"})})
    written = preset(tmp_path, as_yaml(config.model_dump(mode="json"), flow=False))
    assert load_config(written) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PRESET + "train: {steps: 6}\n", "train is given twice, in lines 2 and 4"),
        (
            PRESET + "objective:\n  name: ict\n  ict: {}\n  name: ect\n",
            r"objective\.name is given twice, in lines 5 and 7",
        ),
    ],
)
def test_a_duplicate_key_is_reported_with_both_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^\S*preset\.yaml: {message}"):
        load_config(preset(tmp_path, text))
    with pytest.raises(ConfigError, match=r"steps is given twice, in lines 1 and 1"):
        load_config(None, ["train={steps: 1, steps: 2}"])


def test_anchors_and_merges_are_supported(tmp_path: Path) -> None:
    text = "train: &t {steps: 4, batch_size: 16}\ndata: {name: 'a:b', arguments: {<<: *t, steps: 5}}\n"
    assert load_config(preset(tmp_path, text)).data.arguments == {"steps": 5, "batch_size": 16}


def test_a_preset_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert load_config(preset(tmp_path, "\ufeff" + PRESET)).train.batch_size == 16


def test_an_override_of_a_section_keeps_its_other_keys(tmp_path: Path) -> None:
    config = load_config(preset(tmp_path), ["train={steps: 5, clip: 2}"])
    assert (config.train.steps, config.train.batch_size, config.train.grad_clip) == (5, 16, 2)
    config = load_config(preset(tmp_path), ["train={epochs: 5}"])
    assert (config.train.steps, config.train.epochs, config.train.ema) == (None, 5, (0.9,))
    config = load_config(preset(tmp_path), ["objective={ect: {q: 4}, name: ect}", "objective={ect: {k: 2}}"])
    assert (config.objective.ect.q, config.objective.ect.k) == (4, 2)


def test_an_override_of_a_free_mapping_replaces_it() -> None:
    config = load_config(None, ["data.name=a:b", "data.arguments={x: 1}", "data.arguments={y: 2}"])
    assert config.data.arguments == {"y": 2}


def test_an_invalid_list_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"^train\.ema=\[0\.9 is not valid YAML: .*; in a shell, put it in quotes$"):
        load_config(None, ["train.ema=[0.9"])


def test_a_deepspeed_configuration_in_json_is_a_value() -> None:
    value = {"optimizer": {"params": {"eps": 1e-8, "lr": "auto"}}, "steps_per_print": 10**16}
    assert load_config(None, [f"engine.deepspeed={json.dumps(value)}"]).engine.deepspeed == value
