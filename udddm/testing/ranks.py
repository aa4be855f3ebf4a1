"""Run work on several ranks of this machine without a launcher, for tests and benchmarks of engines."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from udddm import ema, networks
from udddm.backends import engines
from udddm.backends.distributed.ranks import RENDEZVOUS, Ranks, join
from udddm.config import RunConfig
from udddm.runs import weights


def _rank(
    rank: int, world: int, meeting: str, work: Callable[[Ranks], None], device: str, environment: dict[str, str]
) -> None:
    os.environ.clear()  # a fork server has the variables of the time when it started
    os.environ.update(environment)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), RENDEZVOUS: meeting})
    torch.set_num_threads(1)
    ranks = join(device, group=True, timeout=200)
    work(ranks)
    ranks.close()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's engines keep their groups, whose threads may abort a process that exits normally


def on_ranks(world: int, place: Path, work: Callable[[Ranks], None], device: str = "cpu") -> None:
    """Run `work`, which must be picklable, in `world` new processes. Raises RuntimeError if one of them fails.

    On the CPU they are forked from multiprocessing's fork server. After
    `multiprocessing.set_forkserver_preload(["udddm.testing.ranks"])` they start without importing PyTorch again.
    """
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    environment = dict(os.environ)
    processes: list[BaseProcess] = []
    for rank in range(world):
        arguments = (rank, world, str(place / f"meet-{world}"), work, device, environment)
        processes.append(context.Process(target=_rank, args=arguments))  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(200)
        if process.exitcode != 0:
            raise RuntimeError(f"rank {rank} of {world} ended with exit code {process.exitcode}")


class Copy:
    """Load a checkpoint's weights, moments and EMA with the engine of `config`, and save them again without a step."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int], source: Path, target: Path):
        self.config, self.shape, self.source, self.target = config, shape, source, target

    def __call__(self, ranks: Ranks) -> None:
        built = engines.build(networks.for_run(self.config, self.shape), self.config, ranks, 8)
        emas = ema.build(self.config.train, built.weights())
        weights.load(self.source, built, emas)
        if ranks.is_rank_zero:
            self.target.mkdir()
        ranks.barrier()
        weights.save(self.target, built, emas)
