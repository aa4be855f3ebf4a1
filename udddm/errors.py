"""Errors that are told to the user without a trace."""

from __future__ import annotations

import signal

from udddm.urls import redact


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not whole, or is of something else. The message names the file."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class StoreError(RuntimeError):
    """The store cannot go on: a full disk, a failed request, a store of another run. Nothing was lost."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class CorruptChunkError(StoreError):
    """A chunk is missing, truncated, changed, or not the one that was written there.

    `generation`, `lane` and `chunk` say which, `what` all of it in words; the message also says what to do.
    """

    def __init__(self, generation: int, lane: int, chunk: int, where: str, why: str):
        self.generation, self.lane, self.chunk = generation, lane, chunk
        self.what = f"x0-state generation {generation}, lane {lane}, chunk {chunk} is damaged: {why} ({where})"
        super().__init__(
            f"{self.what}. Restore that file from a copy and run the same command again, or with --on-damage "
            "reinitialize, which lets its samples begin again"
        )


class ConfigError(ValueError):
    """A configuration the user has to correct; the message names the key and the cure."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class DataError(ValueError):
    """Data the user has to correct; the message names the file or sample, what is wrong and the cure."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class RankError(RuntimeError):
    """Another rank failed. The message is that rank's."""


class WorkerLost(RuntimeError):
    """A worker ended without a word: killed, out of memory, or its machine is gone."""


class Interrupted(RuntimeError):
    """Training was asked to stop by a signal, and did after a checkpoint. `exit_code` is the shell's for it."""

    def __init__(self, signum: int, step: int):
        self.signum, self.step, self.exit_code = signum, step, 128 + signum
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; the same command resumes")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, int]]:
        return Interrupted, (self.signum, self.step)


class Diverged(RuntimeError):
    """The loss, the weights or what is kept with them are not finite any more; no checkpoint holds such values."""


class Unreadable(CheckpointError):
    """A checkpoint could not be read, which says nothing about whether it is whole."""
