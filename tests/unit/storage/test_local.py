"""Names synced by a local store are durable, also with several threads and after a failed sync."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udddm.errors import StoreError
from udddm.storage.local import LocalObjectStore

KEYS = ("a", "b/a", "b/c/a", "b/c/d")


class Syncs:
    """Records the paths on which `os.fsync` succeeded. It fails while `failing` is positive, and waits in `hold`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.done: list[Path] = []
        self.failing = 0
        self.before: Callable[[Path], None] = lambda path: None
        self._real = os.fsync
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            self.before(path)
            if self.failing:
                self.failing -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real(descriptor)
        self.done.append(path)


def directories(root: Path, key: str) -> set[Path]:
    return {root, *(root / parent for parent in Path(key).parents)}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["put", "put_if_absent", "delete"]), st.sampled_from(KEYS)),
            st.tuples(st.just("sync"), st.integers(0, 4)),
        ),
        max_size=12,
    )
)
def test_every_name_written_before_a_successful_sync_is_durable(actions: list[tuple[str, Any]]) -> None:
    """Regardless of which earlier syncs failed, and where."""
    with pytest.MonkeyPatch.context() as patched, TemporaryDirectory() as place:
        syncs, objects = Syncs(patched), LocalObjectStore(Path(place) / "objects")
        since: dict[Path, int] = {}  # directory with a new name -> number of syncs at that time
        for number, (action, argument) in enumerate([*actions, ("sync", 0)]):
            if action != "sync":
                call = getattr(objects, action)
                done = call(argument) if action == "delete" else call(argument, f"{number}".encode())
                if action == "put" or (action == "put_if_absent" and done):
                    since |= dict.fromkeys(directories(objects.root, argument), len(syncs.done))
                continue
            syncs.failing = argument
            try:
                objects.sync()
            except StoreError:
                continue
            finally:
                syncs.failing = 0
            missing = {path for path, before in since.items() if path.exists() and path not in syncs.done[before:]}
            assert not missing
            since = {}
        assert objects.root.parent in syncs.done or not objects.root.exists()


def test_a_failed_sync_names_the_directory_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs, objects = Syncs(monkeypatch), LocalObjectStore(tmp_path)
    objects.put("a/b", b"1")
    syncs.failing = 1
    with pytest.raises(StoreError, match=f"cannot sync {tmp_path / 'a'}: .*restore access, then run the same command"):
        objects.sync()


def test_a_sync_waits_for_another_threads_sync_of_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs, objects = Syncs(monkeypatch), LocalObjectStore(tmp_path)
    objects.put("a/b", b"1")
    reached, proceed, second_done = threading.Event(), threading.Event(), threading.Event()

    def hold(path: Path) -> None:
        reached.set()
        assert proceed.wait(60)

    def second() -> list[Path]:
        objects.sync()
        second_done.set()
        return list(syncs.done)

    syncs.before = hold
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(objects.sync)
        assert reached.wait(60)
        durable = pool.submit(second)
        returned_early = second_done.wait(0.3)  # a second caller that does not wait returns within microseconds
        proceed.set()
        first.result()
        assert {tmp_path, tmp_path / "a"} <= set(durable.result())
    assert not returned_early
