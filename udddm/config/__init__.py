"""The run configuration: a YAML preset plus dotted overrides, resolved into one typed, frozen object.

This package imports neither torch nor numpy, so that `udddm-train --help` and configuration errors are fast.
"""

from udddm.config.base import Section
from udddm.config.evaluate import EvaluateConfig
from udddm.config.objective import ChainConfig, ECTConfig, EDMConfig, ICTConfig, ObjectiveConfig, RefinedConfig, Stage
from udddm.config.reading import apply, as_yaml, keys_set, load_config, overridden, resolve
from udddm.config.run import (
    CheckpointConfig,
    DataConfig,
    ExpectConfig,
    NetworkConfig,
    OrderConfig,
    RunConfig,
    SampleConfig,
    ScheduleConfig,
    StoreConfig,
)
from udddm.config.train import EngineConfig, TrainConfig
from udddm.errors import ConfigError

__all__ = [
    "ChainConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "ECTConfig",
    "EDMConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExpectConfig",
    "ICTConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OrderConfig",
    "RefinedConfig",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "Section",
    "Stage",
    "StoreConfig",
    "TrainConfig",
    "apply",
    "as_yaml",
    "keys_set",
    "load_config",
    "overridden",
    "resolve",
]
