"""udddm: directly denoising diffusion models (arXiv 2405.21059) with an x0-state store that scales.

The names below load on first use, so that `import udddm` and the commands' `--help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from udddm.api import Model, load_model, sample, train
    from udddm.config import RunConfig, load_config
    from udddm.errors import ConfigError
    from udddm.evaluation.evaluate import evaluate
    from udddm.store import X0Store

_HOMES = {
    "Model": "udddm.api",
    "load_model": "udddm.api",
    "sample": "udddm.api",
    "train": "udddm.api",
    "ConfigError": "udddm.config",
    "RunConfig": "udddm.config",
    "load_config": "udddm.config",
    "evaluate": "udddm.evaluation.evaluate",
    "X0Store": "udddm.store",
}

__all__ = ["ConfigError", "Model", "RunConfig", "X0Store", "evaluate", "load_config", "load_model", "sample", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'udddm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
