"""The exceptions that udddm raises on purpose. Commands print them as one message, without a traceback."""

from __future__ import annotations

import pickle
import signal

from udddm.urls import redact


class UdddmError(Exception):
    """Base class of all errors whose message is meant for the user. Secrets in URLs are removed from the message."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class ConfigError(UdddmError, ValueError):
    """The user has to correct the configuration. The message names the key and what to do."""


class LanesError(ConfigError):
    """The number of ranks does not divide the `lanes` of the order."""

    def __init__(self, message: str, lanes: int):
        self.lanes = lanes
        super().__init__(message)

    def __reduce__(self) -> tuple[type[LanesError], tuple[str, int]]:
        return LanesError, (str(self), self.lanes)


class DataError(UdddmError, ValueError):
    """The user has to correct the data. The message names the file or sample, what is wrong, and what to do."""


class CheckpointError(UdddmError, RuntimeError):
    """A checkpoint cannot be written, is invalid, or belongs to another run. The message names the file."""


class Unreadable(CheckpointError):
    """A checkpoint could not be read. It may be intact, and nothing was removed."""


class StoreError(UdddmError, RuntimeError):
    """The store cannot continue, for example after a full disk or a failed request, or in the store of another run.

    No data was lost.
    """


class CorruptChunkError(StoreError):
    """A chunk is missing, truncated, modified, or not the one that was written there.

    `generation`, `lane` and `chunk` identify the chunk, and `what` describes the problem. The message also states what
    to do.
    """

    def __init__(self, generation: int, lane: int, chunk: int, where: str, why: str):
        self.generation, self.lane, self.chunk = generation, lane, chunk
        self.what = f"x0-state generation {generation}, lane {lane}, chunk {chunk} is damaged: {why} ({where})"
        super().__init__(
            f"{self.what}. Restore that file from a copy and run the same command again, or add --on-corruption "
            "reinitialize, which restarts the samples of that chunk from generation 0"
        )


class RankError(UdddmError, RuntimeError):
    """Another rank failed. The message is the one of that rank."""


class WorkerLost(UdddmError, RuntimeError):
    """A worker ended without reporting an error: it was killed or ran out of memory, or its machine was lost."""


class Diverged(UdddmError, RuntimeError):
    """The loss, a weight or an optimizer moment is no longer finite."""


class Interrupted(UdddmError, RuntimeError):
    """Training stopped after writing a checkpoint, as requested by a signal.

    `step` is None if the workers had not started or had already finished training, so that there was nothing to write.
    `exit_code` is 128 plus the number of the signal, as in shells.
    """

    def __init__(self, signum: int, step: int | None = None):
        self.signum, self.step, self.exit_code = signum, step, 128 + signum
        when = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {signal.Signals(signum).name}{when}; the same command resumes")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, int | None]]:
        return Interrupted, (self.signum, self.step)


def picklable(error: BaseException, otherwise: type[UdddmError] = RankError) -> BaseException:
    """Returns the error, or one of the type `otherwise` with its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return otherwise(f"{type(error).__name__}: {error}")
    return error
