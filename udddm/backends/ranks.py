"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from udddm.config import ConfigError
from udddm.order import check_world


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes what a run has one of."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, value: torch.Tensor) -> float:
        """The sum of the ranks' scalars, on every rank. Waits for the device."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value)

    def gather(self, value: str) -> list[str]:
        """Every rank's string, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[str] = [""] * self.world
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA where there is any. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: no CUDA device is available; use --device cpu")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name != "cpu":
        raise ConfigError(f"--device {name}: choose auto, cpu or cuda")
    return torch.device("cpu")


def join(device: str = "auto", lanes: int | None = None) -> Ranks:
    """Join the ranks that the environment describes (torchrun's RANK, WORLD_SIZE, LOCAL_RANK), or be the only one.

    `lanes` is checked before anything waits: raises ConfigError when the number of ranks does not divide it.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if lanes is not None:
        check_world(lanes, world)
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(rank, world, chosen)
