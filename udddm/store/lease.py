"""Who may write to a store at a URL: one run at a time, found out before anything is overwritten.

A run directory's lock (`udddm.run.locked`) keeps two processes out of one directory; two directories, or two machines,
can still name one `store.url`. So a run holds a lease: an object `lease.json` that says who holds it and until when,
made and replaced only under conditions (`Objects.put_if_absent`, `replace_if`), and renewed in a thread.

Hosts compare the time of expiry with their own clocks. A holder counts by its own monotonic clock and stops by itself
`seconds` after its last renewal; others wait `GRACE` of that time longer, which is how far clocks may be apart.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from udddm.guard import Guard
from udddm.store.errors import StoreError
from udddm.store.objects import Objects, Refused

if TYPE_CHECKING:
    from udddm.backends.ranks import Ranks

KEY = "lease.json"
GRACE = 0.25
"""The part of a lease's time that others wait after its expiry."""
MARGIN = 0.5
"""The part of a lease's time that must be left when a request begins: 30 s, the longest that one may take
(`udddm.store.remote.REQUEST_TIMEOUT`), so that none is on its way when the lease is over."""
WATCH = 12
"""How often in a lease's time the other ranks of its run look at it."""


@dataclass(frozen=True)
class Holder:
    """What a lease says. Times are seconds since 1970 by the holder's clock."""

    owner: str
    host: str
    pid: int
    process: str
    """Tells a process from another that got its id later: its start, in ticks since the boot, and the boot."""
    started: float
    lease: str
    """Of this very lease: no two have the same bytes."""
    renewal: int
    seconds: float
    expires: float

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def dead(self) -> bool:
        """Whether it is a process of this host that is gone."""
        return self.host == socket.gethostname() and self.process != process_identity(self.pid)

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started))
        return f"{self.owner} on {self.host}, process {self.pid}, since {since}"


def process_identity(pid: int) -> str:
    """Of a process on this host; "" when there is none. Where there is no /proc, of its id alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return str(pid)
    try:
        # The name, the second field, is in parentheses and may hold anything; the start is the 22nd field.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else f"{boot} {fields[19]}"


class Lease(Guard):
    """A run's right to write to `objects`, which must not be guarded by it.

    `owner` names the run to others and to itself when it comes back: its directory. `seconds` is how long the right
    lasts without a renewal; it is renewed three times in that time.
    """

    fences = True

    def __init__(self, objects: Objects, owner: str, seconds: float = 60.0):
        self.objects, self.owner, self.seconds = objects, owner, seconds
        self.holder: Holder | None = None
        self._follows = False  # another process of this run renews it
        self._renewed = 0.0  # by the monotonic clock
        self._lost = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lease and begin to renew it, waiting up to `patience` seconds for another's to expire.

        Raises StoreError, which names the other owner, when its lease has not expired by then, or as `Objects.get`
        does. A lease of this same owner whose process was on this host and is gone is taken over at once.
        """
        assert self.holder is None, "a lease is acquired once"
        deadline = time.monotonic() + patience
        while not self._try_to_take():
            found = self._found()
            if found is None:
                continue
            left = found.expires + GRACE * found.seconds - time.time()
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"{self.objects.describe('')} is being written by another run: {found.describe()}. Stop that "
                    "run or choose another URL; if it has crashed, run the same command again in "
                    f"{max(1, math.ceil(left))} s, when its lease is over"
                )
            time.sleep(min(1.0, max(0.01, left), max(0.0, deadline - time.monotonic())))
        self._begin(self._renew_until_released)

    def follow(self, lease: str, until: float) -> None:
        """Watch the lease that another process of this run holds: for the run's other ranks.

        `until` is when it ends, by this process's monotonic clock, unless it is seen to be renewed. Raises StoreError.
        """
        assert self.holder is None, "a lease is acquired once"
        found = self._found()
        if found is None or found.lease != lease:
            raise StoreError(f"the lease of {self.objects.describe('')} was lost while this rank joined")
        self.holder, self._follows = found, True
        self._renewed = until - self.seconds
        self._begin(self._watch_until_released)

    def _begin(self, body: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=body, name="x0-state-lease", daemon=True)
        self._thread.start()

    @property
    def id(self) -> str:
        """What tells this lease from every other; "" when there is none."""
        return self.holder.lease if self.holder is not None else ""

    def left(self) -> float:
        """The seconds for which this process may still count on it."""
        return self.seconds - (time.monotonic() - self._renewed)

    def check(self) -> None:
        """Raise StoreError when the lease is lost, or may be because it could not be renewed in time. Costs nothing."""
        if not self._lost and self.left() < 0:
            self._lost = f"it could not be renewed for {self.seconds:g} s"
        if self._lost:
            raise StoreError(
                f"lost the lease of {self.objects.describe('')}: {self._lost}. The last checkpoint is intact; "
                "make sure that only this run writes there, then run the same command again to resume"
            )

    def wait(self) -> None:
        self.check()
        while self.left() < MARGIN * self.seconds:
            time.sleep(min(0.05, self.seconds / 20))
            self.check()

    def confirm(self) -> None:
        self.check()
        try:
            found = self._decode(self.objects._get(KEY))  # once: the caller has an error to report
        except FileNotFoundError:
            found = None
        except (OSError, Refused, StoreError):
            return
        self._compare(found)
        self.check()

    def _compare(self, found: Holder | None) -> bool:
        """Whether the lease that is there is this one; if not, it is lost."""
        if found is not None and found.lease == self.id:
            return True
        if not self._stopping.is_set():
            self._lost = f"it was taken over by {found.describe()}" if found else "its object was deleted"
        return False

    def release(self) -> None:
        """Stop renewing and give the lease back, if it is still held. Raises nothing: at worst it expires.

        From here on `check` raises.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5)  # it may be in the middle of its retries
            self._thread = None
        held, self.holder = self.holder, None
        lost, self._lost = self._lost, self._lost or "it was given back"
        # Nobody else takes it before it expires; so there is time to look and to delete.
        if held is None or lost or self._follows or self.left() < MARGIN * self.seconds:
            return
        try:
            if self._read() == held.encode():
                self.objects.delete(KEY)
        except StoreError:
            return

    def _read(self) -> bytes | None:
        try:
            return self.objects.get(KEY)
        except FileNotFoundError:
            return None

    def _found(self) -> Holder | None:
        data = self._read()
        return None if data is None else self._decode(data)

    def _decode(self, data: bytes) -> Holder:
        try:
            return Holder(**json.loads(data))
        except (ValueError, TypeError) as error:
            where = self.objects.describe(KEY)
            raise StoreError(f"{where} is damaged ({error}): delete it when no run writes there") from error

    def _try_to_take(self) -> bool:
        began, now = time.monotonic(), time.time()
        pid = os.getpid()
        own = Holder(
            owner=self.owner,
            host=socket.gethostname(),
            pid=pid,
            process=process_identity(pid),
            started=now,
            lease=uuid.uuid4().hex,
            renewal=0,
            seconds=self.seconds,
            expires=now + self.seconds,
        )
        data = self._read()
        if data is None:
            taken = self.objects.put_if_absent(KEY, own.encode())
        else:
            found = self._decode(data)
            free = now > found.expires + GRACE * found.seconds or (found.owner == self.owner and found.dead)
            taken = free and self.objects.replace_if(KEY, own.encode(), data)
        if taken:
            self.holder, self._renewed = own, began
        return taken

    def _renew_until_released(self) -> None:
        while not self._stopping.wait(self.seconds / 3):
            try:
                self._renew()
            except StoreError:
                continue  # check() says so when it lasts too long
            if self._lost:
                return

    def _renew(self) -> None:
        began, held = time.monotonic(), self.holder
        assert held is not None
        renewed = replace(held, renewal=held.renewal + 1, expires=time.time() + self.seconds)
        if self.objects.replace_if(KEY, renewed.encode(), held.encode()):
            self.holder, self._renewed = renewed, began
            return
        found = self._found()
        if self._compare(found):
            self.holder = found  # an earlier renewal got through although none of its replies did

    def _watch_until_released(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(self.seconds / WATCH):
            began = time.monotonic()
            try:
                found = self._found()
            except StoreError:
                continue
            if not self._compare(found):
                return
            assert found is not None and self.holder is not None
            if found.renewal != self.holder.renewal:  # renewed after the last look, which did not show it
                self.holder, self._renewed = found, before
            before = began


def follow(lease: Lease, ranks: Ranks) -> None:
    """On every rank, once the first holds `lease`: let the others' follow it."""
    if ranks.world == 1:
        return
    ranks.barrier()  # so that the time from here to the reply is that of the exchange alone
    began = time.monotonic()
    held, left = ranks.gather((lease.id, lease.left()))[0]
    if not ranks.first:
        lease.follow(held, began + left)
