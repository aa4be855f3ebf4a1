"""The variables of a launcher, left over or incomplete."""

from __future__ import annotations

import pytest

from udddm import log
from udddm.backends.distributed.ranks import RENDEZVOUS, from_launcher, join
from udddm.errors import ConfigError, RankError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", RENDEZVOUS)


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log, "_warned", set())
    return monkeypatch


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_without_the_other_is_ignored_with_one_warning(
    name: str, variables: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    variables.setenv(name, "8")
    assert from_launcher() is None and from_launcher() is None
    ranks = join("cpu", 8)
    assert (ranks.rank, ranks.world_size, ranks.launched) == (0, 1, False)
    assert [message.split(",")[0] for message in caplog.messages] == [f"{name}=8 is ignored"]


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("0", "abc"), ("-1", "2"), ("", "2"), ("0", "")])
def test_variables_that_describe_no_rank_are_refused(rank: str, world: str, variables: pytest.MonkeyPatch) -> None:
    variables.setenv("RANK", rank)
    variables.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=r"no such rank\. If no launcher started this process, unset RANK"):
        join("cpu")


def test_ranks_without_an_address_are_refused(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("RANK", "0")
    variables.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"are set, but not MASTER_ADDR and MASTER_PORT\. If no launcher started"):
        join("cpu")


def test_ranks_that_do_not_meet_end_with_one_error(variables: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", RENDEZVOUS: f"{tmp_path}/meeting"}.items():
        variables.setenv(name, value)
    with pytest.raises(RankError, match=r"not all of the 2 ranks met within 1 s .*If no launcher started"):
        join("cpu", timeout=1)
