"""A rank that fails ends soon, whatever its peers are doing: NCCL, and a stopped peer, must not keep it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from udddm.backends.distributed.ranks import Ranks, join
from udddm.storage import threads

RANK = """
import sys, torch, torch.distributed as dist
from udddm.backends.distributed.ranks import Vote, join
from udddm.cli.command import reported

def body():
    ranks = join("cpu", timeout=300)
    vote = Vote(ranks)
    ranks.barrier()
    print("joined", flush=True)
    if ranks.rank == 1:
        ranks.sum(torch.ones(()))  # waits for the other rank
    sys.stdin.readline()
    vote.cast(1)  # collectives in flight, which the other rank never begins
    pending = dist.all_reduce(torch.ones(10), async_op=True)
    try:
        raise ValueError("failed")
    finally:
        ranks.close(failed=True)
        print("left", dist.is_initialized(), flush=True)

sys.exit(reported(body))
"""


def start(rank: int, place: Path) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "UDDDM_RENDEZVOUS": str(place / "meet")}
    return subprocess.Popen(
        [sys.executable, "-c", RANK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("peer", ["waits", "is stopped"])
def test_a_failed_rank_leaves_while_its_peer_waits_in_a_collective_or_is_stopped(peer: str, tmp_path: Path) -> None:
    """With a time limit of 300 s for collectives, it must not wait for one."""
    ranks = [start(rank, tmp_path) for rank in range(2)]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "joined\n"
        if peer == "is stopped":
            os.kill(ranks[1].pid, signal.SIGSTOP)
        said, errors = ranks[0].communicate("fail\n", timeout=40)
        assert (ranks[0].returncode, said) == (1, "left False\n"), errors
        assert errors.endswith("ValueError: failed\n")
        if peer == "waits":
            errors = ranks[1].communicate(timeout=100)[1]
            assert ranks[1].returncode != 0 and "gloo" in errors, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return join("cpu", group=True)


def test_a_rank_that_cannot_leave_is_abandoned(alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process then ends with `os._exit`, because `threads.abandoned()`."""
    hangs = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(dist.distributed_c10d, "_abort_process_group", hangs.wait)
        alone.close(failed=True, patience=0.1)
        assert threads.abandoned() and dist.is_initialized()
    hangs.set()
    for thread in threads._abandoned:
        thread.join(20)
    assert not threads.abandoned() and not dist.is_initialized()


def test_groups_that_cannot_be_aborted_are_destroyed(alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("not supported")

    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", refuse)
    alone.close(failed=True)
    assert not dist.is_initialized() and not threads.abandoned()
