"""The pipeline's sizes: large enough to keep up, bounded in bytes, and fixed if the caller sets them."""

import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udddm.errors import StoreError
from udddm.order import Order
from udddm.store.autotune import FEWEST, MOST, Autotune, Limits, Smoothed
from udddm.store.pool import Pool

ORDER = Order(seed=1, samples=100_000, batch_size=256, num_lanes=8, chunk_size=256, chunks_per_window=4)
ROW = 6144  # bytes


def measured(step: float, load: float, save: float, **settings: int) -> Autotune:
    pace = Autotune(ORDER, range(8), ROW, Limits(**settings))
    for _ in range(50):
        pace.step.add(step)
        pace.load.add(load)
        pace.save.add(save)
    pace.update()
    return pace


seconds = st.floats(1e-5, 10)


@given(step=seconds, load=seconds, save=seconds, megabytes=st.integers(156, 4000))
def test_chosen_sizes_stay_within_the_allowed_memory(step: float, load: float, save: float, megabytes: int) -> None:
    pace = measured(step, load, save, memory=megabytes * 10**6)
    window, batch = 8 * 4 * 256 * ROW, 256 * ROW
    assert pace.windows * window + 2 * pace.depth * batch <= megabytes * 10**6
    assert 3 * window <= pace.windows * window <= megabytes * 10**6
    assert FEWEST <= pace.readers <= MOST and FEWEST <= pace.writers <= MOST
    assert 1 <= pace.ahead <= pace.windows - 2 and pace.depth >= 1


@given(step=st.floats(0.01, 1), load=st.floats(1e-4, 0.1))
def test_the_number_of_requests_follows_littles_law(step: float, load: float) -> None:
    pace = measured(step, load, load)
    needed = 256 / 256 / step * load  # chunks per second times seconds per chunk
    assert pace.readers >= min(needed, MOST) and pace.writers >= min(needed, MOST)
    assert pace.readers <= max(FEWEST, math.ceil(1.5 * needed) + 1)


def test_slow_requests_get_more_threads_and_windows_and_fast_ones_at_most_three() -> None:
    fast, slow = measured(0.1, 0.001, 0.001), measured(0.02, 2.0, 2.0)
    assert (fast.readers, fast.writers, fast.ahead, fast.windows) == (FEWEST, FEWEST, 1, 3)
    assert slow.readers > fast.readers and slow.writers > fast.writers
    assert slow.ahead > 1 and slow.windows > 4


def test_a_run_starts_with_three_windows_before_it_has_waited() -> None:
    pace = Autotune(ORDER, range(8), ROW, Limits(first_threads=8))
    assert (pace.readers, pace.writers, pace.ahead, pace.windows) == (8, 8, 1, 3)


def test_values_set_by_the_caller_are_used() -> None:
    pace = measured(0.02, 2.0, 2.0, threads=5, prefetch=7)
    assert (pace.readers, pace.writers, pace.depth) == (5, 5, 7)


def test_too_little_memory_is_an_error_that_names_the_minimum() -> None:
    with pytest.raises(StoreError, match=r"store\.memory_mb.*155 MB"):
        Autotune(ORDER, range(8), ROW, Limits(memory=100 * 10**6))


def test_the_estimate_follows_a_change_and_tracks_the_deviation() -> None:
    estimate = Smoothed()
    for _ in range(100):
        estimate.add(1.0)
    assert estimate.mean == pytest.approx(1) and estimate.slow == pytest.approx(1, abs=0.01)
    for _ in range(100):
        estimate.add(3.0)
    assert estimate.mean == pytest.approx(3, abs=0.01)


def test_a_pool_starts_tasks_in_order_and_at_most_its_limit() -> None:
    pool, lock = Pool("test", 3), threading.Lock()
    begun: list[int] = []
    running = most = 0
    done = threading.Semaphore(0)

    def task(number: int) -> None:
        nonlocal running, most
        with lock:
            begun.append(number)
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1
        done.release()

    def all_of(count: int) -> None:
        for number in range(count):
            pool.submit(task, number)
        for _ in range(count):
            assert done.acquire(timeout=10)

    all_of(30)
    assert most == 3 and max(abs(place - number) for place, number in enumerate(begun)) < 3
    for limit in (8, 1):
        pool.limit, most = limit, 0
        begun.clear()
        all_of(40)
        assert most == limit
    assert begun == sorted(begun)
    pool.shutdown()


def test_a_pool_discards_waiting_tasks_and_finishes_started_ones_on_shutdown() -> None:
    pool, began, go = Pool("test", 1), threading.Event(), threading.Event()
    ended: list[int] = []

    def slow() -> None:
        began.set()
        go.wait(10)
        ended.append(0)

    pool.submit(slow)
    for number in (1, 2, 3):
        pool.submit(ended.append, number)
    began.wait(10)
    threading.Timer(0.05, go.set).start()
    pool.shutdown()
    pool.submit(ended.append, 4)
    assert ended == [0]
