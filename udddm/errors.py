"""Errors that are told to the user without a trace."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not whole, or is of something else. The message names the file."""
