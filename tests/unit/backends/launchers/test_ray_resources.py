"""The resources that a worker requests from Ray."""

from __future__ import annotations

from udddm.backends.launchers.ray_train import cpus_per_gpu


def test_a_worker_requests_its_part_of_the_cpus_of_the_smallest_node() -> None:
    assert cpus_per_gpu([{"CPU": 64, "GPU": 8}, {"CPU": 24, "GPU": 4}, {"CPU": 2}]) == 6
    assert cpus_per_gpu([{"CPU": 3, "GPU": 4}]) == 1
    assert cpus_per_gpu([{"CPU": 2}]) == 1
