"""The connection from a run to the launcher that started it."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Listener(ABC):
    """Receives metrics and can request a stop from outside the process, for example a launcher."""

    @abstractmethod
    def stop_signal(self) -> int:
        """The signal for which to write a checkpoint and stop, or 0. Called in every step; must not block."""

    @abstractmethod
    def on_metrics(self, step: int, total: int, values: dict[str, float]) -> None:
        """Receive the metrics of step `step` of `total`. Called on rank zero every `log_every_steps` steps."""
