"""The ranks of a run: a single process, or the processes started by a launcher."""

from __future__ import annotations

import os
import socket
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # see `join`
from torch._C._distributed_c10d import HashStore

from udddm.errors import ConfigError, RankError
from udddm.log import log, warn_once
from udddm.order import check_world
from udddm.storage.threads import Worker, abandon

T = TypeVar("T")
RENDEZVOUS = "UDDDM_RENDEZVOUS"
"""Environment variable with the path of a file for rendezvous on one machine, used instead of a network address."""
TIMEOUT = 600.0
"""Seconds after which a collective operation is considered hung."""
LEAVING = 10.0
"""Seconds that a rank may take to leave the others after a failure. Launchers wait longer before they kill it."""


@dataclass(frozen=True)
class Ranks:
    """The rank and device of this process."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    launched: bool = False
    """Whether a launcher started this process, and decides when it stops."""

    @property
    def is_local_rank_zero(self) -> bool:
        """Whether this rank performs the work that is done once per machine."""
        return self.local_rank == 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank performs the work that is done once per run, such as writing checkpoints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, value: torch.Tensor) -> float:
        """The sum of the scalars of all ranks, on every rank. Waits for the device."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value)

    def gather(self, value: T) -> list[T]:
        """The objects of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_first(self, value: T) -> list[T]:
        """The objects of all ranks, in rank order, on the first rank. Other ranks get an empty list."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_rank_zero else None
        dist.gather_object(value, values)
        return values or []

    def run_on_all(self, action: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
        """Run `action` on every rank, and return its result.

        If it raises one of `errors` on any rank, every rank raises: the failing rank its own error, the others
        RankError. No rank is left waiting.
        """
        failed, result = None, None
        try:
            result = action()
        except errors as error:
            failed = error
        problems = self.gather("" if failed is None else f"rank {self.rank} ({socket.gethostname()}): {failed}")
        if failed is not None:
            raise failed
        if any(problems):
            raise RankError(next(p for p in problems if p))
        return result  # type: ignore[return-value]

    def run_on_rank_zero(self, action: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
        """Run `action` on rank zero, with the errors of `run_on_all`. Returns its result on every rank."""
        return self.gather(self.run_on_all(action if self.is_rank_zero else lambda: None, errors))[0]  # type: ignore[return-value]

    def check_shared(self, directory: Path, what: str) -> None:
        """Raise ConfigError on every rank unless `directory` is the same directory on all ranks."""
        if self.world_size == 1:
            return
        token = directory / f".shared-{self.gather(uuid.uuid4().hex)[0]}"
        if self.is_rank_zero:
            directory.mkdir(parents=True, exist_ok=True)
            token.touch()
        self.barrier()
        seen = self.gather((token.exists(), socket.gethostname()))
        if self.is_rank_zero:
            token.unlink(missing_ok=True)
        blind = sorted({host for found, host in seen if not found})
        if blind:
            raise ConfigError(
                f"{what} {directory} of {seen[0][1]} does not exist on {', '.join(blind)}: ranks on several machines "
                "need a shared file system, or a URL such as s3://bucket/path (--run-dir, --store-url)"
            )

    def close(self, *, failed: bool = False, patience: float = LEAVING) -> None:
        """Leave the process group, if there is one.

        After a failure (`failed`), a collective may be in flight that will never end, because another rank is gone or
        stopped. NCCL may wait for it when a group is destroyed, so its communicators are aborted instead, for which
        this waits at most `patience` seconds. The destructor of a group of gloo waits too; with several ranks the
        groups are therefore kept, and the process should end with `os._exit` (`udddm.storage.threads.abandoned`).
        """
        if not dist.is_initialized():
            return
        if not failed:
            dist.destroy_process_group()
            return
        if self.world_size > 1:
            abandon(dist.distributed_c10d._world.pg_map)
        prepare = partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        worker = Worker("leave the ranks", prepare)
        wait([worker.submit(_abort)], patience)
        worker.close(1.0)


def _abort() -> None:
    """Leave all process groups without waiting for their collectives."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch 2.6 does nothing without NCCL, and warns
            dist.distributed_c10d._abort_process_group()
    except Exception as error:  # the function is experimental in PyTorch 2.6 to 2.13
        log.debug("the process groups cannot be aborted (%s), so they are destroyed", error)
    if dist.is_initialized():
        dist.destroy_process_group()


class Vote:
    """Agreement of all ranks on whether to stop, without blocking: the outcome of a vote is read in the next step.

    All ranks therefore stop after the same step, whichever of them received a signal.
    """

    def __init__(self, ranks: Ranks):
        self._group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self._value = torch.zeros(1, dtype=torch.int64)
        self._pending: Any = None

    def cast(self, value: int) -> int:
        """Cast this step's vote. Returns the largest vote of the previous step; for a single rank, `value`."""
        if self._group is None:
            return value
        outcome = self.outcome()
        self._value = torch.tensor([value])
        self._pending = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return outcome

    def outcome(self) -> int:
        """Wait for the outcome of the last vote, and return it. 0 before the first vote."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return int(self._value)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`: auto, cpu or cuda. `auto` is CUDA if available, otherwise the CPU.

    Raises ConfigError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: no CUDA device is available; use --device cpu")
        device = torch.device("cuda", _gpu(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        return device
    if name != "cpu":
        raise ConfigError(f"--device {name}: choose auto, cpu or cuda")
    return torch.device("cpu")


def _gpu(local_rank: int, visible: int) -> int:
    """The index of a rank's GPU: `local_rank`, or 0 if the launcher made only one GPU visible to each rank."""
    if visible == 1 and os.environ.get("CUDA_VISIBLE_DEVICES") and RENDEZVOUS not in os.environ:
        return 0
    if local_rank >= visible:
        raise ConfigError(f"local rank {local_rank} has no GPU: this machine has {visible}; use fewer workers")
    return local_rank


def join(device: str = "auto", lanes: int | None = None, *, group: bool = False, timeout: float = TIMEOUT) -> Ranks:
    """Join the ranks described by the environment: RANK, WORLD_SIZE and LOCAL_RANK, as set by torchrun.

    Without these variables this process is the only rank, and has a process group only if `group`. A collective
    operation of more than `timeout` seconds is an error.

    Raises ConfigError, before waiting for other ranks, if the number of ranks does not divide `lanes` or the device is
    not available.

    This module imports torch.distributed.nn before there is a default group, because its functions keep the default
    group as the default of their arguments. A group still referenced when the interpreter exits has threads, and a
    thread that then frees a tensor aborts the process.
    """
    launched = from_launcher()
    rank, world = launched or (0, 1)
    if lanes is not None:
        check_world(lanes, world)
    local_rank = _number("LOCAL_RANK", 0) if launched else 0
    chosen = choose_device(device, local_rank)
    if (world > 1 or group) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        try:
            if world == 1:
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=limit)
            elif RENDEZVOUS in os.environ:
                method = f"file://{os.environ[RENDEZVOUS]}"
                dist.init_process_group(backend, init_method=method, rank=rank, world_size=world, timeout=limit)
            else:
                if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
                    raise ConfigError(f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}. {_UNSET}")
                dist.init_process_group(backend, timeout=limit)
        except RuntimeError as error:
            raise RankError(
                f"not all of the {world} ranks met within {timeout:.0f} s ({str(error).partition('. ')[0]}). {_UNSET}"
            ) from error
    return Ranks(rank, world, chosen, local_rank, launched=world > 1 or RENDEZVOUS in os.environ)


_UNSET = "If no launcher started this process, unset RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


def from_launcher() -> tuple[int, int] | None:
    """The rank and the number of ranks that torchrun or another launcher set in the environment. None without a
    launcher.

    A variable without the other is left over from something else, and is ignored. Raises ConfigError for variables that
    describe no rank.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) < 2:
        if given:
            other = "WORLD_SIZE" if given == ["RANK"] else "RANK"
            warn_once(f"{given[0]}={os.environ[given[0]]} is ignored, because a launcher would set {other} as well")
        return None
    rank, world = _number("RANK", -1), _number("WORLD_SIZE", 0)
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={os.environ['RANK']}, WORLD_SIZE={os.environ['WORLD_SIZE']}: no such rank. {_UNSET}")
    return rank, world


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else otherwise
