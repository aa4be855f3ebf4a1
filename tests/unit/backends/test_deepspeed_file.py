"""Mistakes in a DeepSpeed file that DeepSpeed itself ignores or reports with a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from udddm.backends.engines import deepspeed_config, deepspeed_keys
from udddm.config import RunConfig, resolve
from udddm.errors import ConfigError


def with_keys(keys: dict[str, Any]) -> RunConfig:
    return resolve({"engine": {"name": "deepspeed", "deepspeed": keys}})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gradient_cliping": 1.0}, r"gradient_cliping: .*did you mean gradient_clipping\?"),
        ({"zero_optimisation": {"stage": 3}}, r"zero_optimisation: .*did you mean zero_optimization\?"),
        ({"zero_optimization": {"stge": 2}}, r"zero_optimization\.stge: .*did you mean stage\?"),
        ({"zero_optimization": {"stage3_prefetch_bucket": 2}}, r"did you mean stage3_prefetch_bucket_size\?"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, r"offload_optimizer\.devise: .*device"),
        ({"bf16": {"enable": True}}, r"bf16\.enable: .*did you mean enabled\?"),
        ({"optimizer": {"params": {"learning_rate": 1e-3}}}, r"optimizer\.params\.learning_rate: .*remove it"),
        ({"xyz": 1}, "xyz: DeepSpeed has no such key; remove it"),
    ],
)
def test_the_error_names_an_unknown_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config.resolve(with_keys(keys), 1)


def test_one_error_names_all_mistakes() -> None:
    with pytest.raises(ConfigError) as raised:
        deepspeed_config.resolve(
            with_keys({"gradient_cliping": 1.0, "zero_optimization": {"stge": 2}, "amp": {"a": 1}}), 1
        )
    assert all(name in str(raised.value) for name in ("gradient_cliping", "zero_optimization.stge", "amp:"))


def test_known_keys_and_comments_are_accepted() -> None:
    keys = {
        "_comment": "mine",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "overlap_comm": True, "stage3_max_live_parameters": 1e9},
        "communication_data_type": "fp32",
        "flops_profiler": {"enabled": False},
    }
    found = deepspeed_config.resolve(with_keys(keys), 1)
    assert found["zero_optimization"]["overlap_comm"]
    assert "_comment" not in found


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 0}}')
    with pytest.raises(ConfigError, match=r"d\.json: zero_optimization is given twice"):
        deepspeed_config.read(tmp_path / "d.json")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"steps_per_print": 5}), encoding="utf-8-sig")
    assert deepspeed_config.read(tmp_path / "d.json") == {"steps_per_print": 5}


def test_the_installed_deepspeed_has_no_other_keys() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for section, model in models.items():
        fields = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
        assert set(deepspeed_keys.KNOWN[section].split()) == fields, section
