"""Requests to stop: the first is recorded, a second one stops immediately."""

from __future__ import annotations

import os
import signal

import pytest

from udddm.backends.distributed import signals
from udddm.backends.distributed.signals import STOPPING, StopRequest, handled


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [10.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


def test_a_second_signal_stops_immediately(clock: list[float]) -> None:
    told: list[int] = []
    stop = StopRequest(told.append)
    assert stop.signum == 0
    stop(signal.SIGTERM)
    clock[0] += 1
    with pytest.raises(KeyboardInterrupt) as raised:
        stop(signal.SIGTERM)
    assert raised.value.args == (signal.SIGTERM,)
    assert stop.signum == signal.SIGTERM and told == [signal.SIGTERM]


def test_the_same_signal_to_a_process_and_its_group_is_one_request(clock: list[float]) -> None:
    stop = StopRequest()
    stop(signal.SIGTERM)
    stop(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT)


def test_a_rank_of_a_launcher_leaves_an_immediate_stop_to_the_launcher(clock: list[float]) -> None:
    stop = StopRequest(once=True)
    stop(signal.SIGTERM)
    clock[0] += 100
    stop(signal.SIGINT)
    assert stop.signum == signal.SIGTERM


@pytest.mark.parametrize("signum", STOPPING)
def test_signals_are_handled_until_the_end(signum: signal.Signals) -> None:
    before, stop = signal.getsignal(signum), StopRequest()
    with handled(stop):
        os.kill(os.getpid(), signum)
    assert stop.signum == signum
    assert signal.getsignal(signum) == before


def test_a_hangup_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with handled(stop):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)
