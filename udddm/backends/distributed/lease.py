"""TODO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from udddm.storage.lease import Instant, Lease

if TYPE_CHECKING:
    from udddm.backends.distributed.ranks import Ranks


def follow(lease: Lease, ranks: Ranks) -> None:
    """On every rank, once the first holds `lease`: let the others' follow it."""
    if ranks.world_size == 1:
        return
    ranks.barrier()  # so that the time from here to the reply is that of the exchange alone
    began = Instant.now()
    held, left = ranks.gather((lease.id, lease.left()))[0]
    if not ranks.is_rank_zero:
        lease.follow(held, began.later(left - lease.seconds))
