"""What can go wrong with an x0-state store."""

from udddm.errors import StoreError

__all__ = ["DamagedChunkError", "StoreError"]


class DamagedChunkError(StoreError):
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
