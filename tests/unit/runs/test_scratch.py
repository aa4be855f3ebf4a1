"""The local directories of a run at a URL on machines that share a home directory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from udddm.backends.distributed.ranks import Ranks
from udddm.runs import remote
from udddm.runs.remote import RemoteRun

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Gathering(Ranks):
    """A rank that learns of the others from `values`."""

    values: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        return self.values or [value]


def directories(machines: list[tuple[str, str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directory of each rank, given (name of the directory, process table, local rank)."""
    ranks = [Gathering(rank, len(machines), CPU, local) for rank, (_, _, local) in enumerate(machines)]

    def separated(index: int, values: list[Any]) -> tuple[Path, list[Any]]:
        name, table, _ = machines[index]
        monkeypatch.setattr(remote, "process_table", lambda: table)
        run = RemoteRun("memory://separate/run", tmp_path / name)
        seen: list[Any] = []
        gather = replace(ranks[index], values=values)
        monkeypatch.setattr(Gathering, "gather", lambda self, value: seen.append(value) or self.values or [value] * 9)
        run._separate(gather)
        return run.path, seen

    values = [separated(index, [])[1][0] for index in range(len(machines))]
    return [str(separated(index, values)[0].relative_to(tmp_path)) for index in range(len(machines))]


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        ([("a", "1", 0), ("a", "1", 1)], ["a", "a"]),
        ([("a", "1", 0), ("b", "2", 0)], ["a", "b"]),
        ([("a", "1", 0), ("a", "1", 1), ("a", "2", 0), ("a", "2", 1)], ["a", "a", "a-rank-2", "a-rank-2"]),
        ([("a", "1", 0), ("a", "2", 0), ("a", "1", 1), ("a", "2", 1)], ["a", "a-rank-1", "a", "a-rank-1"]),
        ([("a", "1", 0), ("a", "1", 0)], ["a", "a-rank-1"]),  # containers of one process table
    ],
)
def test_machines_with_the_same_name_and_id_use_separate_directories(
    machines: list[tuple[str, str, int]], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert directories(machines, tmp_path, monkeypatch) == expected
