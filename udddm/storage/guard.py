"""Whether this process may still write to a store; checked before every request that changes an object."""

from __future__ import annotations


class Guard:
    """Allows everything, for stores that a lock on this machine protects. `udddm.storage.lease.Lease` may refuse."""

    fences = False
    """Whether another process may take over the right to write while a request is in progress. Existing objects are
    then replaced only if nobody else has replaced them since the guard was last checked."""

    def check(self) -> None:
        """Raise StoreError if the right to write is lost. Makes no request."""

    def wait(self) -> None:
        """Return when there is enough time left for a request. Raises StoreError if the right to write is lost."""

    def confirm(self) -> None:
        """Same as `check`, after reading who holds the right. Called before corruption is reported, because a successor
        may have caused it.

        Does not raise if the holder cannot be read.
        """


class Guards(Guard):
    """Combines several guards; all of them must allow."""

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
