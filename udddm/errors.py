"""Errors that are told to the user without a trace."""

from __future__ import annotations

from udddm.urls import redact


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not whole, or is of something else. The message names the file."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class StoreError(RuntimeError):
    """The store cannot go on: a full disk, a failed request, a store of another run. Nothing was lost."""

    def __init__(self, message: str):
        super().__init__(redact(message))
