"""The errors that udddm raises on purpose. Commands print them as one message, without a traceback."""

from __future__ import annotations

import signal

from udddm.urls import redact


class UdddmError(Exception):
    """Base class of all errors whose message is meant for the user. URLs in it are shown without secrets."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class ConfigError(UdddmError, ValueError):
    """A configuration that the user has to correct. The message names the key and what to do."""


class DataError(UdddmError, ValueError):
    """Data that the user has to correct. The message names the file or sample, what is wrong, and what to do."""


class CheckpointError(UdddmError, RuntimeError):
    """A checkpoint cannot be written, is not valid, or belongs to something else. The message names the file."""


class Unreadable(CheckpointError):
    """A checkpoint could not be read, which need not mean that it is damaged. Nothing was removed."""


class StoreError(UdddmError, RuntimeError):
    """The store cannot continue: a full disk, a failed request, a store of another run. Nothing was lost."""


class CorruptChunkError(StoreError):
    """A chunk is missing, truncated, changed, or not the one that was written there.

    `generation`, `lane` and `chunk` identify it, `what` describes it; the message also tells what to do.
    """

    def __init__(self, generation: int, lane: int, chunk: int, where: str, why: str):
        self.generation, self.lane, self.chunk = generation, lane, chunk
        self.what = f"x0-state generation {generation}, lane {lane}, chunk {chunk} is damaged: {why} ({where})"
        super().__init__(
            f"{self.what}. Restore that file from a copy and run the same command again, or add --on-corruption "
            "reinitialize, which restarts the samples of that chunk from generation 0"
        )


class RankError(UdddmError, RuntimeError):
    """Another rank failed. The message is that rank's."""


class WorkerLost(UdddmError, RuntimeError):
    """A worker ended without reporting an error: killed, out of memory, or its machine is gone."""


class Diverged(UdddmError, RuntimeError):
    """The loss, a weight or a moment is no longer finite."""


class Interrupted(UdddmError, RuntimeError):
    """Training stopped after a checkpoint because a signal asked for it. `exit_code` is the shell's for that signal."""

    def __init__(self, signum: int, step: int):
        self.signum, self.step, self.exit_code = signum, step, 128 + signum
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; the same command resumes")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, int]]:
        return Interrupted, (self.signum, self.step)
