"""Waits for the store count as far as the device had nothing to do, which recorded times show."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from udddm.store.base import StoreCounters
from udddm.store.idle import DeviceIdle, HostIdle, idle_of


@dataclass
class Device:
    """A device whose work so far ends at `free`. It passes a mark when it has done the work before it."""

    now: float = 0.0
    free: float = 0.0

    def work(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def mark(self) -> RecordedMark:
        return RecordedMark(self, max(self.free, self.now))


@dataclass
class RecordedMark:
    device: Device
    at: float

    def passed(self) -> bool:
        return self.device.now >= self.at

    def seconds_until(self, later: RecordedMark) -> float:
        assert self.passed() and later.passed()
        return later.at - self.at


@pytest.mark.parametrize(
    ("work", "wait", "idle"),
    [
        (5.0, 3.0, 0.0),  # the device is busy when the wait ends
        (5.0, 5.0, 0.0),
        (2.0, 3.0, 1.0),  # it was free after 2 of 3 seconds
        (0.0, 3.0, 3.0),  # it had nothing to do from the start
    ],
)
def test_only_the_time_after_the_last_work_counts(work: float, wait: float, idle: float) -> None:
    device = Device()
    waits = DeviceIdle(device.mark, lambda: device.now)
    device.work(work)
    waits.begin()
    device.now += wait
    waits.end()
    assert waits.seconds == pytest.approx(idle)


def test_idle_times_of_several_waits_add_up() -> None:
    device = Device()
    waits = DeviceIdle(device.mark, lambda: device.now)
    for work, wait in ((1.0, 3.0), (4.0, 1.0), (0.0, 2.0), (0.0, 5.0)):  # the second one's work lasts until the last
        device.work(work)
        waits.begin()
        device.now += wait
        waits.end()
    assert device.now == 11.0
    assert waits.seconds == pytest.approx(2.0 + 0.0 + 0.0 + 4.0)  # free from 1 to 3, and from 7 to 11


def test_a_wait_is_counted_later_if_the_device_has_not_passed_its_end() -> None:
    """Between the end of the wait and its mark, other work may have been given to the device."""
    device = Device()
    waits = DeviceIdle(device.mark, lambda: device.now)
    waits.begin()
    device.now += 2.0
    device.work(1.0)  # by another thread
    waits.end()
    assert waits.seconds == 0.0
    device.now += 1.0
    assert waits.seconds == pytest.approx(2.0)  # and not 3: the wait had ended


def test_a_cpu_does_nothing_while_it_waits() -> None:
    waits = idle_of(torch.device("cpu"))
    assert isinstance(waits, HostIdle) and waits.seconds == 0
    for _ in range(2):
        before = waits.seconds
        waits.begin()
        waits.end()
        assert waits.seconds > before


def test_the_fraction_is_that_of_the_device_and_of_the_host_if_a_store_does_not_measure_it() -> None:
    for idle, fraction in ((None, 0.75), (1.0, 0.25)):
        found = StoreCounters(read_wait=2.0, write_wait=1.0, idle=idle).metrics(StoreCounters(), 4.0)
        assert found["store_wait_fraction"] == fraction
        assert (found["store_read_wait_seconds"], found["store_write_wait_seconds"]) == (2.0, 1.0)
