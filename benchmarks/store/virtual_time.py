"""Virtual time: threads that run one at a time, their locks and queues, and a clock that jumps (`World`)."""

from __future__ import annotations

import heapq
import itertools
import math
import queue
import random
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from udddm.storage import base as objects_module
from udddm.storage import threads as threads_module
from udddm.store import pipeline as pipeline_module
from udddm.store import pool as pool_module
from udddm.store import zarr as zarr_module


class Task:
    def __init__(self) -> None:
        self.baton = threading.Lock()
        self.baton.acquire()
        self.parked = self.woken = self.done = False
        self.ticket = 0
        self.joiners: list[Task] = []


class World:
    """Runs threads one at a time. When all of them wait, the clock jumps to the earliest timeout."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ready: deque[Task] = deque()
        self._timers: list[tuple[float, int, Task, int]] = []
        self._serial = itertools.count()
        self.current = self._main = Task()
        self._deadlock = False

    def clock(self) -> float:
        return self.now

    def spawn(self, body: Callable[[], None]) -> Task:
        task = Task()

        def run() -> None:
            task.baton.acquire()
            try:
                body()
            finally:
                task.done = True
                for joiner in task.joiners:
                    self.wake(joiner)
                self._pass_on(task)

        threading.Thread(target=run, daemon=True).start()
        self._ready.append(task)
        return task

    def join(self, task: Task) -> None:
        while not task.done:
            task.joiners.append(self.current)
            self.block()

    def sleep(self, seconds: float) -> None:
        self.block(max(0.0, seconds))

    def block(self, timeout: float | None = None) -> bool:
        """Park the running thread until `wake`, or for `timeout` seconds. False on timeout."""
        me = self.current
        me.parked, me.woken = True, False
        me.ticket += 1
        if timeout is not None:
            heapq.heappush(self._timers, (self.now + timeout, next(self._serial), me, me.ticket))
        if self._pass_on(me):
            me.baton.acquire()
        if self._deadlock and me is self._main:
            raise RuntimeError("every simulated thread waits for another")
        return me.woken

    def wake(self, task: Task) -> None:
        if task.parked:
            task.parked, task.woken = False, True
            self._ready.append(task)

    def _pass_on(self, me: Task) -> bool:
        """Let the next thread run. False if that is the calling one."""
        self.current = self._choose()
        if self.current is me:
            return False
        self.current.baton.release()
        return True

    def _choose(self) -> Task:
        if self._ready:
            return self._ready.popleft()
        while self._timers:
            when, _, task, ticket = heapq.heappop(self._timers)
            if task.parked and task.ticket == ticket:
                self.now, task.parked = when, False
                return task
        self._deadlock, self._main.parked = True, False
        return self._main

    def install(self, seed: int) -> ExitStack:
        """Make the store's modules use this virtual time until the stack is closed."""
        clock = SimpleNamespace(perf_counter=self.clock, monotonic=self.clock, sleep=self.sleep)
        thread = SimpleNamespace(
            Thread=partial(VirtualThread, self),
            Condition=partial(VirtualCondition, self),
            Lock=partial(VirtualLock, self),
            Event=partial(VirtualEvent, self),
        )
        queues = SimpleNamespace(Queue=partial(VirtualQueue, self), Empty=queue.Empty, Full=queue.Full)
        stack = ExitStack()
        for module, name, value in (
            (pipeline_module, "threading", thread),
            (pipeline_module, "queue", queues),
            (pipeline_module, "time", clock),
            (pool_module, "threading", thread),
            (threads_module, "threading", thread),
            (pipeline_module, "_POLL", 5.0),  # only checks for failures; fewer checks are faster
            (zarr_module, "threading", thread),
            (objects_module, "threading", thread),
            (objects_module, "time", clock),
            (objects_module, "random", random.Random(seed)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        return stack


class VirtualThread:
    def __init__(self, world: World, target: Callable[..., None], args: tuple[Any, ...] = (), **_: Any):
        self._world, self._body = world, partial(target, *args)
        self._task: Task | None = None

    def start(self) -> None:
        self._task = self._world.spawn(self._body)

    def join(self) -> None:
        assert self._task is not None
        self._world.join(self._task)


class VirtualLock:
    """A reentrant lock, like that of a condition."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._owner: Task | None = None
        self._depth = 0
        self._waiting: deque[Task] = deque()

    def __enter__(self) -> None:
        while self._owner not in (None, self._world.current):
            self._waiting.append(self._world.current)
            self._world.block()
        self._owner = self._world.current
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            if self._waiting:
                self._world.wake(self._waiting.popleft())


class VirtualCondition(VirtualLock):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._notified: list[Task] = []

    def wait(self, timeout: float | None = None) -> bool:
        depth, self._depth = self._depth, 1
        self.__exit__()
        self._notified.append(self._world.current)
        woken = self._world.block(timeout)
        self.__enter__()
        self._depth = depth
        return woken

    def notify_all(self) -> None:
        for task in self._notified:
            self._world.wake(task)
        self._notified.clear()


class VirtualEvent:
    def __init__(self, world: World) -> None:
        self._changed, self._set = VirtualCondition(world), False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            if not self._set:
                self._changed.wait(timeout)
        return self._set


class VirtualQueue:
    def __init__(self, world: World, maxsize: int = 0):
        self._world, self.maxsize = world, maxsize or 1 << 60
        self.mutex, self.not_full = nullcontext(), SimpleNamespace(notify_all=self._notify)
        self._items: deque[Any] = deque()
        self._changed: list[Task] = []

    def qsize(self) -> int:
        return len(self._items)

    def full(self) -> bool:
        return len(self._items) >= self.maxsize

    def _wait(self, until: float) -> bool:
        self._changed.append(self._world.current)
        return self._world.block(until - self._world.now)

    def _notify(self) -> None:
        for task in self._changed:
            self._world.wake(task)
        self._changed.clear()

    def get(self, timeout: float = math.inf) -> Any:
        until = self._world.now + timeout
        while not self._items:
            if not self._wait(until):
                raise queue.Empty
        item = self._items.popleft()
        self._notify()
        return item

    def put(self, item: Any, timeout: float = math.inf) -> None:
        until = self._world.now + timeout
        while self.full():
            if not self._wait(until):
                raise queue.Full
        self._items.append(item)
        self._notify()

    def get_nowait(self) -> Any:
        if not self._items:
            raise queue.Empty
        return self.get()

    def put_nowait(self, item: Any) -> None:
        if self.full():
            raise queue.Full
        self.put(item)
