"""Object stores that are slow, fail on purpose, or log requests: wrappers around any `udddm.storage.base.ObjectStore`.

    inner = open_object_store("s3://bucket/prefix")
    faulty = FaultyObjectStore(DelayedObjectStore(inner, seconds=0.05))
    faulty.fail(ConnectionResetError("reset"), times=2, operation="put")
    faulty.fail(TimeoutError("no reply"), operation="put_if_absent", after=True)

A wrapper sees single requests: each attempt is delayed, may fail, and is recorded separately. The outermost wrapper
retries and counts the `retries`. Wrappers can be nested. A zarr store opens its object store itself; in a test, give it
a wrapped one with

    monkeypatch.setattr(
        "udddm.store.zarr.open_object_store", lambda url: DelayedObjectStore(open_object_store(url), 0.05)
    )
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar, get_args

from udddm.storage.base import ObjectStore

T = TypeVar("T")
Operation = Literal["get", "put", "put_if_absent", "compare_and_swap", "list", "delete"]


class WrappedObjectStore(ObjectStore):
    """Passes each request on to `inner`. A subclass overrides `_request`, which is called for all of them.

    Takes over the retry settings that `inner` has when it is wrapped, and its `uri`. Closing it closes `inner`.
    """

    def __init__(self, inner: ObjectStore):
        super().__init__()
        self.inner = inner
        self.retry = inner.retry

    @property
    def conditional(self) -> bool:
        return self.inner.conditional

    def _request(self, operation: Operation, key: str, sent: int, action: Callable[[], T]) -> T:
        """One attempt at a request with `sent` bytes of content. Returns the result of `action` or raises its error."""
        return action()

    def _get(self, key: str) -> bytes:
        return self._request("get", key, 0, partial(self.inner._get, key))

    def _put(self, key: str, parts: tuple[bytes | memoryview, ...]) -> None:
        size = sum(memoryview(part).nbytes for part in parts)
        self._request("put", key, size, partial(self.inner._put, key, parts))

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        return self._request("put_if_absent", key, len(data), partial(self.inner._put_if_absent, key, data))

    def _compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        return self._request(
            "compare_and_swap", key, len(data), partial(self.inner._compare_and_swap, key, data, expected)
        )

    def _list(self, prefix: str) -> Sequence[str]:
        return self._request("list", prefix, 0, partial(self.inner._list, prefix))

    def _sizes(self, prefix: str) -> dict[str, int]:
        return self._request("list", prefix, 0, partial(self.inner._sizes, prefix))

    def _delete(self, prefix: str) -> None:
        self._request("delete", prefix, 0, partial(self.inner._delete, prefix))

    def uri(self, key: str) -> str:
        return self.inner.uri(key)

    def close(self) -> None:
        super().close()
        self.inner.close()


class DelayedObjectStore(WrappedObjectStore):
    """Delays every request by `seconds`. `close` ends all delays."""

    def __init__(self, inner: ObjectStore, seconds: float):
        super().__init__(inner)
        self.seconds = seconds

    def _request(self, operation: Operation, key: str, sent: int, action: Callable[[], T]) -> T:
        self._closed.wait(self.seconds)
        return action()


@dataclass(frozen=True)
class _Fault:
    error: Exception
    operation: str
    after: bool


class FaultyObjectStore(WrappedObjectStore):
    """Lets requests fail as set with `fail`. `failed` counts the failures."""

    def __init__(self, inner: ObjectStore):
        super().__init__(inner)
        self.failed = 0
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def fail(
        self, error: Exception, times: int = 1, operation: Operation | Literal[""] = "", *, after: bool = False
    ) -> None:
        """Let the next `times` requests raise `error`, after the faults set earlier; only of `operation`, if given.

        An OSError is retried, except PermissionError; `PermanentStorageError` and FileNotFoundError are not. With
        `after`, the request takes effect first and its result is lost. Raises ValueError if there is no such operation.
        """
        if operation and operation not in get_args(Operation):
            raise ValueError(f"no operation {operation!r}: there are {', '.join(get_args(Operation))}")
        with self._lock:
            self._faults += [_Fault(error, operation, after)] * times

    def heal(self) -> None:
        """Cancel the faults that have not occurred yet."""
        with self._lock:
            self._faults.clear()

    def _request(self, operation: Operation, key: str, sent: int, action: Callable[[], T]) -> T:
        fault = self._next_fault(operation)
        if fault is None:
            return action()
        if fault.after:
            with suppress(Exception):  # an error also counts as a reply
                action()
        raise fault.error.with_traceback(None)  # else the traceback of a repeated fault would grow

    def _next_fault(self, operation: Operation) -> _Fault | None:
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.operation in ("", operation):
                    self.failed += 1
                    return self._faults.pop(index)
        return None


@dataclass(frozen=True)
class Request:
    """One attempt at a request."""

    operation: Operation
    key: str
    """The key; the prefix for a listing or deletion."""
    bytes: int
    """Bytes of content that were sent, or received by a `get`."""
    seconds: float
    outcome: str
    """"done"; "not done" for a conditional write whose condition was not met; else the repr of the error."""

    def __str__(self) -> str:
        return f"{self.operation} {self.key}: {self.outcome}, {self.bytes} bytes, {1000 * self.seconds:.1f} ms"


class LoggedObjectStore(WrappedObjectStore):
    """Records every request when it ends, in `requests` and with `log`, a function or a logger (level INFO).

    `log` is called in the thread of the request, possibly from several at once. Its errors are raised by the request.
    """

    def __init__(self, inner: ObjectStore, log: Callable[[Request], object] | logging.Logger | None = None):
        super().__init__(inner)
        self._log = log.info if isinstance(log, logging.Logger) else log
        self._requests: list[Request] = []
        self._lock = threading.Lock()

    @property
    def requests(self) -> list[Request]:
        """A copy of the records so far, in the order in which the requests ended."""
        with self._lock:
            return list(self._requests)

    def _request(self, operation: Operation, key: str, sent: int, action: Callable[[], T]) -> T:
        began = time.perf_counter()
        size, outcome = sent, "done"
        try:
            result = action()
            if isinstance(result, bytes):
                size = len(result)
            elif result is False:
                outcome = "not done"
            return result
        except Exception as error:
            outcome = repr(error)
            raise
        finally:
            self._record(Request(operation, key, size, time.perf_counter() - began, outcome))

    def _record(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)
        if self._log is not None:
            self._log(request)
