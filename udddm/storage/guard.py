"""Whether this process may still change what is at a place: asked before every request that changes anything."""

from __future__ import annotations


class Guard:
    """Allows everything: for places that a lock on this machine protects. `udddm.storage.lease.Lease` may refuse."""

    fences = False
    """Whether another process may take the right away while a request is on its way: objects that are there are then
    replaced only if nobody else has replaced them since the guard was last asked."""

    def check(self) -> None:
        """Raise StoreError when the right to write is lost. Costs nothing."""

    def wait(self) -> None:
        """Return when there is time for a request. Raises StoreError when the right to write is lost."""

    def confirm(self) -> None:
        """As `check`, after a look at who holds the right: before damage is reported, which a successor may have made.

        Raises nothing when that cannot be read.
        """


class Guards(Guard):
    """All of several guards."""

    def __init__(self, *guards: Guard):
        self.guards = guards
        self.fences = any(guard.fences for guard in guards)

    def check(self) -> None:
        for guard in self.guards:
            guard.check()

    def wait(self) -> None:
        for guard in self.guards:
            guard.wait()

    def confirm(self) -> None:
        for guard in self.guards:
            guard.confirm()
