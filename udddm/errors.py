"""Errors that are told to the user without a trace."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not whole, or is of something else. The message names the file."""


class StoreError(RuntimeError):
    """The store cannot go on: a full disk, a failed request, a store of another run. Nothing was lost."""
