"""The result of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """The contents of a run's `result.json`."""

    steps: int
    """Optimizer steps of the run."""
    epochs: float
    images_per_second: float
    """Averaged over this process's part of the run, since its last resume."""
    store_wait_fraction: float
    """Fraction of the time that steps waited for the x0-state store."""
    peak_host_memory_bytes: int
    """Peak memory of the first rank."""
    weights_sha256: str
    """Fingerprint of the float32 weights."""
    ema_sha256: str
    """Fingerprint of all EMAs of the weights."""
    state_sha256: str
    """Fingerprint of the x0-state, as stored."""
    store_reinitialized: int = 0
    """Samples whose state was reset to generation 0 because a chunk was corrupt."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainResult:
        """Create from the contents of `result.json`. Unknown keys are ignored. Raises TypeError if a key is missing."""
        return cls(**{key: value for key, value in values.items() if key in cls.__dataclass_fields__})

    def to_dict(self) -> dict[str, Any]:
        """The contents of `result.json`."""
        return asdict(self)

    def __getitem__(self, key: str) -> Any:
        """Item access: `result["steps"]` is `result.steps`."""
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)
