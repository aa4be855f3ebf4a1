"""The run configuration: a YAML preset plus dotted overrides, resolved into one typed, frozen object.

This package imports neither torch nor numpy: it is what `udddm-train --help` and a configuration error pay for.
"""

from udddm.config.base import Section
from udddm.config.objective import ChainConfig, ConsistencyConfig, DenoiserConfig, ObjectiveConfig, Stage, TuningConfig
from udddm.config.reading import apply, load, resolve
from udddm.config.run import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ExpectConfig,
    NetworkConfig,
    OrderConfig,
    ProcessConfig,
    RunConfig,
    SampleConfig,
    StoreConfig,
    TrainConfig,
)
from udddm.errors import ConfigError

__all__ = [
    "ChainConfig",
    "CheckpointConfig",
    "ConsistencyConfig",
    "DataConfig",
    "DenoiserConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExpectConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OrderConfig",
    "ProcessConfig",
    "RunConfig",
    "SampleConfig",
    "Section",
    "Stage",
    "StoreConfig",
    "TrainConfig",
    "TuningConfig",
    "apply",
    "load",
    "resolve",
]
