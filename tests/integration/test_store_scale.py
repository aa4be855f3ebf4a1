"""The model of benchmarks/store/scale.py: the real store code in virtual time over a modeled object store."""

import importlib
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "store"))
store_scale = importlib.import_module("scale")
pipeline = importlib.import_module("udddm.store.pipeline")

FREE = store_scale.Service(0, 0, 0, 0, connection=math.inf, link=math.inf, total=math.inf, gets=math.inf, puts=math.inf)
RANKS = 4
WORK = store_scale.Workload("test", RANKS * 1000, (1, 16, 16), 400.0, batch=16, chunk=64, window=4)
"""16 chunks of 32 KiB per lane in 4 windows of 0.64 s; 63 steps per epoch; 205 kB/s each way and rank."""
BYTES_PER_SECOND = RANKS * 400.0 * 512


def run(service=FREE, workload=WORK, **options):
    return store_scale.run(workload, RANKS, service, **options)


def test_a_free_object_store_never_makes_a_run_wait():
    result = run(steps=150)
    assert result.failure is None and result.wait == 0 and not result.stalls
    assert result.seconds == pytest.approx(149 * result.step_seconds)


def test_virtual_time_restores_the_store_and_leaves_no_thread():
    before = threading.active_count()
    began = time.perf_counter()
    assert run(steps=100).seconds > 3.9
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert pipeline.threading is threading and pipeline.time is time
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("limit", ["link", "total"])
def test_too_little_bandwidth_slows_a_run_in_proportion(limit, share):
    """Within an epoch; at its end a run waits longer, because the rows written last are read first."""
    long = replace(WORK, samples=RANKS * 30000)
    ranks = RANKS if limit == "link" else 1
    result = run(replace(FREE, **{limit: share * BYTES_PER_SECOND / ranks}), long, steps=1500)
    assert result.seams == 0 and result.stalls
    assert result.wait == pytest.approx(1 - share, abs=0.05)


def test_twice_the_bandwidth_needed_is_enough_within_an_epoch():
    assert run(replace(FREE, total=2 * BYTES_PER_SECOND), steps=60).wait < 0.01


@pytest.mark.parametrize("kind", ["get", "put"])
def test_the_wait_grows_with_the_latency(kind):
    waits = []
    for median in (0.0, 0.1, 0.2, 0.4, 0.8):
        service = replace(FREE, **{f"{kind}_median": median, f"{kind}_p99": median * 1.0001})
        waits.append(run(service, steps=200, threads=2).wait)
    assert waits[0] == 0 and waits[-1] > 0.1
    assert waits[1] <= waits[2] <= waits[-1]  # in between, more windows are held for slow puts


@pytest.mark.parametrize("kind", ["get", "put"])
def test_automatic_threads_and_windows_hide_a_latency_that_two_threads_do_not(kind):
    long = replace(WORK, samples=RANKS * 30000)  # no epoch ends: the end would wait for the last writes
    service = replace(FREE, **{f"{kind}_median": 0.8, f"{kind}_p99": 1.2})
    waits = [run(service, long, steps=1500, threads=threads).wait for threads in (2, None)]
    assert waits[1] < 0.03 and waits[1] < waits[0] / 5


@pytest.mark.parametrize("latency", [0.0, 0.05])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_chunk_is_written_once_and_read_at_most_once_per_epoch(epochs, latency):
    order = WORK.order(RANKS)
    service = replace(FREE, get_median=latency, get_p99=2 * latency, put_median=latency, put_p99=2 * latency)
    result = run(service, steps=epochs * order.steps_per_epoch)
    chunks = sum(order.num_chunks(lane) for lane in range(RANKS))
    ahead = RANKS * 2 * order.chunks_per_window  # windows of the next epoch that are already read
    assert result.chunks_written == epochs * chunks
    # Rows written at the end of an epoch are passed to the next epoch in memory.
    handed_over = (epochs - 1) * RANKS * 2 * order.chunks_per_window
    assert epochs * chunks - handed_over <= result.chunks_read <= epochs * chunks + ahead


def test_without_a_second_epoch_each_chunk_is_read_exactly_once():
    order = WORK.order(RANKS)
    slow = replace(FREE, put_median=100.0, put_p99=100.1)  # the next generation is never available to read
    result = run(slow, steps=order.steps_per_epoch // 4)
    assert result.chunks_read <= sum(order.num_chunks(lane) for lane in range(RANKS))


def test_refused_requests_are_retried_and_more_prefixes_avoid_them():
    scarce = replace(FREE, gets=0.6 * 6.25 * RANKS, puts=math.inf, burst=0.5)
    refused = run(scarce, steps=150)
    assert refused.refused > 0 and refused.stalls
    spread = run(replace(scarce, prefixes=4), steps=150)
    assert spread.wait < refused.wait / 2


def test_a_permanently_refusing_object_store_ends_the_run_with_the_stores_error():
    result = run(replace(FREE, gets=0.01, burst=0.01), steps=50)
    assert result.stalls and "SlowDown" in result.failure


def test_a_run_is_a_function_of_its_seed():
    service = replace(store_scale.Service(), gets=40, puts=40)
    assert run(service, steps=100, seed=3) == run(service, steps=100, seed=3)
    assert run(service, steps=100, seed=3).seconds != run(service, steps=100, seed=4).seconds
