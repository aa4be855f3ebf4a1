"""Ensures that only one run at a time writes to a store at a URL, before anything is overwritten.

A run directory's lock (`udddm.runs.run.locked`) keeps two processes from using one directory, but two directories or
two machines can still use the same `store.url`. So a run holds a lease: an object `lease.json` with its holder and its
expiry, created and replaced only conditionally (`ObjectStore.put_if_absent`, `compare_and_swap`) and renewed in a
thread.

Clocks of different hosts are never compared. A holder stops `seconds` after its last renewal, by whichever of its
clocks shows the most. Another run takes a lease over once it has seen it unchanged for that time plus `GRACE` of it.
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from udddm.errors import StoreError
from udddm.storage.base import ObjectStore, PermanentStorageError
from udddm.storage.guard import Guard
from udddm.storage.threads import start_thread

if TYPE_CHECKING:
    pass

KEY = "lease.json"
GRACE = 0.25
"""The fraction of a lease's duration that others wait after its expiry."""
MARGIN = 0.5
"""The fraction of a lease's duration that must be left when a request starts: 30 s, the request timeout
(`udddm.storage.s3.REQUEST_TIMEOUT`), so that no request is in progress when the lease expires."""
LONGEST = 86_400.0
"""Seconds. A longer lease is not valid."""
WATCH = 12
"""How many times per lease duration the other ranks of its run read it."""


class Instant(NamedTuple):
    """A moment by all clocks of this host. Some stop while the host sleeps or is paused, and one can be set."""

    monotonic: float
    boot: float
    wall: float

    @classmethod
    def now(cls) -> Instant:
        monotonic = time.monotonic()
        boot = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else monotonic
        return cls(monotonic, boot, time.time())

    def later(self, seconds: float) -> Instant:
        return Instant(*(clock + seconds for clock in self))

    def passed(self) -> float:
        """The seconds since then, by the clock that shows the most."""
        return max(now - then for now, then in zip(Instant.now(), self, strict=True))


@dataclass(frozen=True)
class Holder:
    """The content of a lease. Times are seconds since 1970 by the holder's clock, for display only."""

    owner: str
    host: str
    pid: int
    process: str
    """Distinguishes a process from a later one with the same id: its start in ticks since boot, and the boot id."""
    started: float
    lease: str
    """Unique to each lease, so that no two have the same bytes."""
    renewal: int
    seconds: float
    expires: float
    machine: str = ""
    """The scope in which `pid` is valid: machine, boot and PID namespace (`process_table`). "" in older leases."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Holder:
        """Raises ValueError, TypeError. Unknown keys come from another version and are ignored."""
        found = dict(json.loads(data))
        kinds = {"str": str, "int": int, "float": (int, float)}
        known = {field.name: kinds[str(field.type)] for field in fields(cls)}
        values = {name: found[name] for name in known if name in found}
        for name, kind in known.items():
            if name != "machine" and name not in values:
                raise ValueError(f"it lacks {name}")
            if name in values and not isinstance(values[name], kind):  # type: ignore[arg-type]
                raise ValueError(f"{name} is {values[name]!r:.40}")
        if not 0 < values["seconds"] <= LONGEST or not all(0 <= values[n] < 1e11 for n in ("started", "expires")):
            raise ValueError("its times are not possible")
        return cls(**values)

    @property
    def dead(self) -> bool:
        """Whether the holder is a process on this machine that no longer exists."""
        return bool(self.machine) and self.machine == process_table() and self.process != process_identity(self.pid)

    @property
    def looks_over(self) -> bool:
        """Whether it has expired by the clocks of two hosts, which may differ. Only the waiting time depends on it."""
        return time.time() > self.expires + GRACE * self.seconds

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started))
        return f"{self.owner} on {self.host}, process {self.pid}, since {since}"


def _read_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def process_table() -> str:
    """An id of the set of processes visible to this one, which differs on other machines and in other containers.

    "" if it cannot be determined.
    """
    boot = _read_line("/proc/sys/kernel/random/boot_id")
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return ""
    return f"{_read_line('/etc/machine-id')} {boot} {namespace}" if boot else ""


def process_identity(pid: int) -> str:
    """The `Holder` identity of a visible process; "" if there is no such process, or no /proc."""
    try:
        # The second field, the name, is in parentheses and may contain anything; the start is the 22nd field.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if stat[0] == "Z" else f"{_read_line('/proc/sys/kernel/random/boot_id')} {stat[19]}"


class Lease(Guard):
    """A run's right to write to `objects`, which must not itself be guarded by the lease.

    `owner` identifies the run, to others and when it resumes: its directory. `seconds` is how long the right lasts
    without a renewal; it is renewed three times in that time.
    """

    fences = True

    def __init__(self, objects: ObjectStore, owner: str, seconds: float = 60.0):
        self.objects, self.owner, self.seconds = objects, owner, seconds
        self.holder: Holder | None = None
        self._follows = False  # another process of this run renews it
        self._renewed = Instant(0.0, 0.0, 0.0)
        self._lost = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, patience: float = 0.0) -> None:
        """Acquire the lease and start renewing it, waiting up to `patience` seconds for another lease to expire.

        Another lease counts as expired once this process has seen it unchanged for its duration plus `GRACE` of it. One
        that seems expired by the clocks is watched for that long in any case. A lease of the same owner whose process
        ran on this machine and no longer exists is taken over at once. Raises StoreError, which names the other owner,
        if that lease is renewed or has not expired by then, and in the same cases as `ObjectStore.get`.
        """
        assert self.holder is None, "a lease is acquired once"
        began = since = time.monotonic()
        seen, lives = self._read(), False
        while not self._take(seen, time.monotonic() - since):
            data = self._read()
            if data != seen:
                seen, since, lives = data, time.monotonic(), True
            if data is None:
                continue
            found = self._decode(data)
            left = found.seconds * (1 + GRACE) - (time.monotonic() - since)
            if time.monotonic() - began >= patience and (lives or not found.looks_over):
                raise StoreError(self._refusal(found, left))
            time.sleep(max(0.01, min(1.0, found.seconds / 20, left)))
        self._begin(self._renew_until_released)

    def follow(self, lease: str, renewed: Instant) -> None:
        """Watch the lease that another process of this run holds. Called on the run's other ranks.

        `renewed`: the lease was renewed then or later. Later renewals count from when they are seen. Raises StoreError.
        """
        assert self.holder is None, "a lease is acquired once"
        found = self._found()
        if found is None or found.lease != lease:
            raise StoreError(f"the lease of {self.objects.uri('')} was lost while this rank joined")
        self.holder, self._follows = found, True
        self._renewed = renewed
        self._begin(self._watch_until_released)

    def _begin(self, body: Callable[[], None]) -> None:
        self._thread = start_thread(body, "x0-state-lease")

    @property
    def id(self) -> str:
        """A unique id of this lease; "" if there is none."""
        return self.holder.lease if self.holder is not None else ""

    def left(self) -> float:
        """The seconds for which this process may still rely on the lease."""
        return self.seconds - self._renewed.passed()

    def check(self) -> None:
        """Raise StoreError if the lease is lost, or may be because it was not renewed in time. Makes no request."""
        if not self._lost and self.left() < 0:
            self._lost = f"it could not be renewed for {self.seconds:g} s"
        if self._lost:
            raise StoreError(
                f"lost the lease of {self.objects.uri('')}: {self._lost}. Checkpoints are intact; "
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
        except (OSError, PermanentStorageError, StoreError):
            return
        self._compare(found)
        self.check()

    def _compare(self, found: Holder | None) -> bool:
        """Whether the lease found in the store is this one; if not, it is lost."""
        if found is not None and found.lease == self.id:
            return True
        if not self._stopping.is_set():
            self._lost = f"it was taken over by {found.describe()}" if found else "its object was deleted"
        return False

    def release(self) -> None:
        """Stop renewing and release the lease, if it is still held. Does not raise: at worst the lease expires.

        From then on `check` raises.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5)  # it may be in the middle of its retries
            self._thread = None
        held, self.holder = self.holder, None
        lost, self._lost = self._lost, self._lost or "it was released"
        # Nobody else takes it before it expires, so there is time to read and delete it.
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
            return Holder.decode(data)
        except (ValueError, TypeError, RecursionError) as error:
            where = self.objects.uri(KEY)
            raise StoreError(f"{where} is damaged ({error}): delete it when no run writes there") from error

    def _refusal(self, found: Holder, left: float) -> str:
        return (
            f"{self.objects.uri('')} is being written by another run: {found.describe()}. Stop that run or choose "
            f"another URL. If it has crashed, run the same command again: its lease expires when it has not been "
            f"renewed for {max(1, math.ceil(left))} s. If that process has certainly ended, you may also delete "
            f"{self.objects.uri(KEY)}"
        )

    def _take(self, seen: bytes | None, unchanged: float) -> bool:
        """Whether this process now holds the lease; `seen` is the content found, unchanged for `unchanged` seconds."""
        began, pid = Instant.now(), os.getpid()
        own = Holder(
            owner=self.owner,
            host=socket.gethostname(),
            pid=pid,
            process=process_identity(pid),
            started=began.wall,
            lease=uuid.uuid4().hex,
            renewal=0,
            seconds=self.seconds,
            expires=began.wall + self.seconds,
            machine=process_table(),
        )
        if seen is None:
            taken = self.objects.put_if_absent(KEY, own.encode())
        else:
            found = self._decode(seen)
            over = unchanged > found.seconds * (1 + GRACE)
            if not over and not (found.owner == self.owner and found.dead):
                return False
            if not self.objects.conditional:
                raise StoreError(
                    f"{self.objects.uri('')} was being written by {found.describe()}. This kind of URL has no "
                    "conditional writes, so its lease cannot be handed over safely while other runs may request it. If "
                    f"that process has certainly ended, delete {self.objects.uri(KEY)} and run the same command again"
                )
            taken = self.objects.compare_and_swap(KEY, own.encode(), seen)
        if taken:
            self.holder, self._renewed = own, began
        return taken

    def _renew_until_released(self) -> None:
        while not self._stopping.wait(self.seconds / 3):
            try:
                self._renew()
            except StoreError:
                continue  # check() raises if it lasts too long
            if self._lost:
                return

    def _renew(self) -> None:
        began, held = Instant.now(), self.holder
        assert held is not None
        renewed = replace(held, renewal=held.renewal + 1, expires=time.time() + self.seconds)
        if self.objects.compare_and_swap(KEY, renewed.encode(), held.encode()):
            self.holder, self._renewed = renewed, began
            return
        found = self._found()
        if self._compare(found):
            self.holder = found  # an earlier renewal succeeded although its reply was lost

    def _watch_until_released(self) -> None:
        before = Instant.now()
        while not self._stopping.wait(self.seconds / WATCH):
            began = Instant.now()
            try:
                found = self._found()
            except StoreError:
                continue
            if not self._compare(found):
                return
            assert found is not None and self.holder is not None
            if found.renewal != self.holder.renewal:  # renewed after the last read, which did not show it
                self.holder, self._renewed = found, before
            before = began
