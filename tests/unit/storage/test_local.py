"""Names synced by a local store are durable, also with several threads and after a failed sync."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udddm import files
from udddm.errors import StoreError
from udddm.runs.run import locked
from udddm.storage.lease import Holder, Lease
from udddm.storage.local import LocalObjectStore
from udddm.tools.convert import collect

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


class Lacking:
    """A file system without locks, hard links and syncs of directories, such as some network file systems."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.sync = os.fsync
        monkeypatch.setattr(files.fcntl, "flock", self._refused(errno.ENOLCK))
        monkeypatch.setattr(os, "link", self._refused(errno.EPERM))
        monkeypatch.setattr(os, "fsync", self._fsync)

    @staticmethod
    def _refused(number: int) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    def _fsync(self, descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.sync(descriptor)


def test_a_lease_on_a_file_system_without_locks_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lacking(monkeypatch)
    objects = LocalObjectStore(tmp_path)
    first = Lease(objects, "first")
    first.acquire()
    with pytest.raises(StoreError, match="is being written by another run: first"):
        Lease(LocalObjectStore(tmp_path), "second").acquire()
    first._renew()
    assert objects.get("lease.json").count(b'"renewal": 1') == 1
    assert not objects.conditional
    monkeypatch.setattr(Holder, "dead", True)
    with pytest.raises(StoreError, match="has no conditional writes"):  # two runs could take it over at once
        Lease(LocalObjectStore(tmp_path), "first").acquire()
    first.release()


def test_directories_that_cannot_be_synced_are_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Lacking(monkeypatch)
    for name in ("a", "b"):
        files.write_text(tmp_path / name, name)
    assert (tmp_path / "b").read_text() == "b"
    assert [message for message in caplog.messages if "cannot sync directories" in message] == caplog.messages[:1]


def test_a_run_directory_without_locks_is_used_with_a_warning_and_never_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Lacking(monkeypatch)
    with locked(tmp_path / "run") as exclusive:
        assert not exclusive
    assert "has no locks: make sure that no other process trains there" in caplog.text
    (tmp_path / "run" / "run.json").write_text('{"config": {}}')
    with pytest.raises(StoreError, match="a live run cannot be detected: nothing was deleted"):
        collect(str(tmp_path / "run"), print)
