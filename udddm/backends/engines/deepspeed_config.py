"""Merges the configuration of a run and the user's DeepSpeed file into the configuration passed to DeepSpeed.

Merging needs neither PyTorch nor DeepSpeed, so that contradictions are found before anything starts.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from udddm.backends.engines.deepspeed_keys import unknown
from udddm.config import RunConfig
from udddm.errors import ConfigError
from udddm.files import expanded

REFUSED = {
    "scheduler": "the learning rate is train.learning_rate, train.warmup_steps and train.lr_schedule",
    "amp": "the precision is train.precision",
    "torch_autocast": "the precision is train.precision",
    "elasticity": "the number of workers is --workers MIN:MAX",
    "curriculum_learning": "the x0-state store determines the order of samples",
    "data_efficiency": "the x0-state store determines the order of samples",
    "pipeline": "pipeline parallelism is not supported",
    "tensor_parallel": "tensor parallelism is not supported",
    "compression_training": "compression of weights in training is not supported",
    "data_types": "master weights and accumulated gradients are always float32",
}
"""Sections that are not allowed in a DeepSpeed file, with the reason or the setting to use instead."""


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a DeepSpeed JSON file. Raises ConfigError if it cannot be read."""
    try:
        loaded = json.loads(expanded(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed configuration {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"the DeepSpeed configuration {path} must hold a JSON object, not a {type(loaded).__name__}")
    return loaded


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file. Raises ValueError for a repeated key, of which Python would use the last value."""
    found = dict(pairs)
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice: join the two, or remove one")
    return found


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage: `engine.zero`, or else the stage in the DeepSpeed file, or else 0. Raises ConfigError."""
    if config.engine.zero is not None:
        return config.engine.zero
    section = config.engine.deepspeed.get("zero_optimization")
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    if stage == "auto":
        return 0
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"DeepSpeed configuration, zero_optimization.stage: {stage!r} is not 0, 1, 2 or 3")
    return int(stage)


def _ours(config: RunConfig, world: int) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that follows from the configuration of the run."""
    train, stage = config.train, zero_stage(config)
    zero: dict[str, Any] = {"stage": stage}
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // world // train.grad_accumulation,
        "gradient_accumulation_steps": train.grad_accumulation,
        "gradient_clipping": train.grad_clip or 0.0,
        "fp16": {"enabled": train.precision == "fp16"},
        "bf16": {"enabled": train.precision == "bf16"},
        "optimizer": {
            "type": {"adam": "Adam", "adamw": "AdamW", "radam": "RAdam"}[train.optimizer],
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.betas),
                "eps": 1e-8,
                "weight_decay": train.weight_decay,
            },
        },
        "zero_allow_untested_optimizer": train.optimizer == "radam",
        "zero_optimization": zero,
    }


REMEDIES = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size, train.grad_accumulation and the number of workers",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "gradient_clipping": "train.grad_clip",
    "fp16.enabled": "train.precision",
    "bf16.enabled": "train.precision",
    "optimizer.type": "train.optimizer",
    "optimizer.params.weight_decay": "train.weight_decay",
    "optimizer.params.lr": "train.learning_rate",
    "optimizer.params.betas": "train.betas",
    "zero_optimization.stage": "engine.zero",
    "zero_optimization.offload_optimizer.device": "engine.offload",
}
"""Keys of DeepSpeed's configuration, with the setting of the run that determines them."""


def _merge(ours: dict[str, Any], theirs: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """`ours` with the keys of `theirs` added. Appends contradictions to `problems`."""
    merged = dict(ours)
    for key, value in theirs.items():
        name = prefix + key
        if value == "auto":
            continue  # use ours, or DeepSpeed's default
        if isinstance(value, dict):
            own = ours.get(key, {})
            merged[key] = _merge(own if isinstance(own, dict) else {}, value, name + ".", problems)
        elif key in ours and ours[key] != value:
            where = REMEDIES.get(name)
            problems.append(
                f"{name} is {json.dumps(value)} in the file and {json.dumps(ours[key])} in the run's configuration"
                + (f" ({where})" if where else "")
            )
        else:
            merged[key] = value
    return merged


def resolve(config: RunConfig, world: int) -> dict[str, Any]:
    """The configuration passed to DeepSpeed for a run of `world` ranks.

    Every "auto" is replaced by the run's setting, or by DeepSpeed's default if the run has none. Raises ConfigError,
    which names every key of the file that contradicts the configuration of the run or is not supported.
    """
    theirs = config.engine.deepspeed
    problems = list(unknown(theirs))
    problems += [f"{key}: {why}" for key, why in REFUSED.items() if theirs.get(key) not in (None, "auto", {})]
    merged = _merge(
        _ours(config, world),
        {k: v for k, v in theirs.items() if k not in REFUSED and not k.startswith("_")},
        "",
        problems,
    )
    zero = merged["zero_optimization"]
    for side in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(side), dict) and zero[side].get("device") == "nvme":
            problems.append(f"zero_optimization.{side}.device: nvme is not supported; use cpu")
    if isinstance(zero.get("offload_param"), dict) and zero["offload_param"].get("device", "none") != "none":
        problems.append("zero_optimization.offload_param: only the optimizer can be offloaded (engine.offload)")
    if problems:
        raise ConfigError(
            "DeepSpeed configuration:\n  "
            + "\n  ".join(problems)
            + '\n  correct the file; "auto" uses the value of the run'
        )
    del merged["optimizer"]  # passed as an object instead: PyTorch's fused Adam, which needs no compiler
    fp16 = merged["fp16"]
    if fp16["enabled"]:  # the loss scaling of PyTorch, so that the engines agree
        for key, value in {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}.items():
            fp16.setdefault(key, value)
    merged.setdefault("steps_per_print", 1 << 60)
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    merged.setdefault("zero_allow_untested_optimizer", True)
    return merged
