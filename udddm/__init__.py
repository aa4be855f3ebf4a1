"""udddm: directly denoising diffusion models (arXiv 2405.21059) with a scalable x0-state store.

Public names are imported on first use, which keeps `import udddm` and `--help` of the commands fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from udddm.api import sample as sample
    from udddm.api import train as train
    from udddm.config import RunConfig as RunConfig
    from udddm.config import load_config as load_config
    from udddm.errors import CheckpointError as CheckpointError
    from udddm.errors import ConfigError as ConfigError
    from udddm.errors import CorruptChunkError as CorruptChunkError
    from udddm.errors import DataError as DataError
    from udddm.errors import Diverged as Diverged
    from udddm.errors import Interrupted as Interrupted
    from udddm.errors import RankError as RankError
    from udddm.errors import StoreError as StoreError
    from udddm.errors import UdddmError as UdddmError
    from udddm.errors import WorkerLost as WorkerLost
    from udddm.evaluation.evaluate import Scores as Scores
    from udddm.evaluation.evaluate import evaluate as evaluate
    from udddm.runs.model import Model as Model
    from udddm.runs.model import load_model as load_model
    from udddm.runs.per_sample.state import PerSampleState as PerSampleState
    from udddm.runs.result import TrainResult as TrainResult
    from udddm.store.base import X0Store as X0Store
    from udddm.training.callbacks import Callback as Callback
    from udddm.training.callbacks import RunInfo as RunInfo
else:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'udddm' has no attribute {name!r}; it has {', '.join(__all__)}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


_HOMES = {
    "sample": "udddm.api",
    "train": "udddm.api",
    "RunConfig": "udddm.config",
    "load_config": "udddm.config",
    "Callback": "udddm.training.callbacks",
    "RunInfo": "udddm.training.callbacks",
    "CheckpointError": "udddm.errors",
    "ConfigError": "udddm.errors",
    "CorruptChunkError": "udddm.errors",
    "DataError": "udddm.errors",
    "Diverged": "udddm.errors",
    "Interrupted": "udddm.errors",
    "RankError": "udddm.errors",
    "StoreError": "udddm.errors",
    "UdddmError": "udddm.errors",
    "WorkerLost": "udddm.errors",
    "Scores": "udddm.evaluation.evaluate",
    "evaluate": "udddm.evaluation.evaluate",
    "Model": "udddm.runs.model",
    "load_model": "udddm.runs.model",
    "PerSampleState": "udddm.runs.per_sample.state",
    "TrainResult": "udddm.runs.result",
    "X0Store": "udddm.store.base",
}

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigError",
    "CorruptChunkError",
    "DataError",
    "Diverged",
    "Interrupted",
    "Model",
    "PerSampleState",
    "RankError",
    "RunConfig",
    "RunInfo",
    "Scores",
    "StoreError",
    "TrainResult",
    "UdddmError",
    "WorkerLost",
    "X0Store",
    "evaluate",
    "load_config",
    "load_model",
    "sample",
    "train",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
