"""The resources that a worker requests from Ray."""

from __future__ import annotations

import pytest

from udddm.backends.launchers.ray_train import _not_connected, cpus_per_gpu


def test_a_worker_requests_its_part_of_the_cpus_of_the_smallest_node() -> None:
    assert cpus_per_gpu([{"CPU": 64, "GPU": 8}, {"CPU": 24, "GPU": 4}, {"CPU": 2}]) == 6
    assert cpus_per_gpu([{"CPU": 3, "GPU": 4}]) == 1
    assert cpus_per_gpu([{"CPU": 2}]) == 1


@pytest.mark.parametrize(
    ("address", "error", "expected"),
    [
        ("localhost", ValueError("Invalid address format: localhost"), "or HOST:PORT of the head node"),
        ("", OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), "set RAY_TMPDIR to a shorter path"),
    ],
)
def test_an_error_of_ray_at_the_start_says_what_to_set(address: str, error: Exception, expected: str) -> None:
    message = _not_connected(address, error)
    assert expected in message and str(error) in message
