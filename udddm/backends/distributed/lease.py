"""Sharing the lease of the first rank with the other ranks of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from udddm.storage.lease import Instant, Lease

if TYPE_CHECKING:
    from udddm.backends.distributed.ranks import Ranks


def follow(lease: Lease, ranks: Ranks) -> None:
    """Make the `lease` of every other rank follow that of the first rank, which must hold it. Called on every rank."""
    if ranks.world_size == 1:
        return
    ranks.barrier()  # so that the time until the reply is that of the exchange alone
    began = Instant.now()
    held, left = ranks.gather((lease.id, lease.left()))[0]
    if not ranks.is_rank_zero:
        lease.follow(held, began.later(left - lease.seconds))
