"""`udddm-store gc` deletes only generations that no checkpoint can need, and refuses if it cannot determine them."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import udddm
from udddm import config
from udddm.cli.store import main as store_command
from udddm.errors import ConfigError, StoreError
from udddm.runs.run import Run
from udddm.storage import open_object_store
from udddm.storage.lease import Lease
from udddm.store.encoding import Rows
from udddm.store.generations import Generations
from udddm.tools.convert import collect, convert
from udddm.tools.inspect import find

SETTINGS = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.0, condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 50, batch_size: 128, ema: [0.99]}",  # three epochs of 15 steps, and five steps
    "checkpoint={every_steps: 45, keep: 2}",  # both are of epoch 3
    "sample.every_steps=0",
    "store.kind=zarr",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and one with a separate store URL, the path `store` next to it."""
    root = tmp_path_factory.mktemp("runs")
    udddm.train(config.load_config(None, SETTINGS), run_dir=root / "plain", device="cpu")
    udddm.train(
        config.load_config(None, [*SETTINGS, f"store.url={root / 'store'}"]), run_dir=root / "linked", device="cpu"
    )
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run whose checkpoints need generations 3 and 4, with a leftover 1, and 6 from a killed start."""
    copied = Path(shutil.copytree(finished / "plain", tmp_path / "run"))
    for extra in (1, 6):
        shutil.copytree(copied / "state" / "gen-000003", copied / "state" / f"gen-{extra:06d}", dirs_exist_ok=True)
    return copied


@pytest.fixture
def linked(finished: Path) -> Iterator[tuple[Path, Path]]:
    """A run and its store, which is restored at the end."""
    saved = shutil.copytree(finished / "store", finished / uuid.uuid4().hex)
    shutil.copytree(finished / "store" / "gen-000003", finished / "store" / "gen-000001", dirs_exist_ok=True)
    yield finished / "linked", finished / "store"
    shutil.rmtree(finished / "store")
    saved.rename(finished / "store")


def generations(store: Path) -> list[int]:
    return sorted(int(p.name[4:]) for p in store.glob("gen-*"))


def test_gc_deletes_unreferenced_generations_and_reports_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generations(run / "state") == [1, 3, 4, 6]
    assert store_command(["gc", str(run)]) == 0
    said = capsys.readouterr().out
    assert generations(run / "state") == [3, 4, 6]
    assert "step-00000050 to 3 and 4" in said
    assert f"deleting gen-000001 from {run / 'state'}: no checkpoint refers to it" in said
    assert "keeping gen-000006: it is newer than the newest checkpoint" in said
    assert "removed 1 (generations)" in said


def test_gc_sees_a_checkpoint_written_before_it_locked_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists are read under the lock, because checkpoints listed earlier may refer to other generations."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    for older in sorted((run / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(older)
    header = json.loads((newest / "state" / "snapshot.json").read_text())
    assert header["epoch"] == 3
    (run / "checkpoints").rename(run / "elsewhere")
    (run / "checkpoints").mkdir()
    held = Run.lock

    @contextmanager
    def slowly(self: Run, patience: float | None = None) -> Iterator[None]:
        assert patience == 0
        with held(self, patience):
            (run / "checkpoints").rmdir()
            (run / "elsewhere").rename(run / "checkpoints")
            yield

    monkeypatch.setattr(Run, "lock", slowly)
    collect(str(run), print)
    assert generations(run / "state") == [3, 4, 6]


def test_gc_of_a_live_run_is_refused(run: Path) -> None:
    with Run(run).lock(), pytest.raises(ConfigError, match="another process"):
        collect(str(run), print)
    assert generations(run / "state") == [1, 3, 4, 6]


def test_gc_of_a_live_run_at_a_url_is_refused_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on another machine, whose lease expires in a minute. The command does not wait for it."""
    url = f"memory://{uuid.uuid4().hex}"
    udddm.train(config.load_config(None, SETTINGS), run_dir=url, device="cpu")
    objects = open_object_store(f"{url}/state")
    objects.put("gen-000001/zarr.json", objects.get("gen-000003/zarr.json"))
    lease = Lease(open_object_store(url), "a live run")
    lease.acquire()
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(StoreError, match="a live run"):
        collect(url, print)
    assert objects.exists("gen-000001")
    lease.release()
    monkeypatch.undo()
    assert collect(url, print) == [1]


def test_gc_is_refused_without_checkpoints(run: Path) -> None:
    """For example because they are on a disk that is not mounted."""
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(StoreError, match=r"holds no checkpoint.*nothing was deleted"):
        collect(str(run), print)
    assert generations(run / "state") == [1, 3, 4, 6]


@pytest.mark.parametrize("which", [0, -1])
def test_gc_is_refused_when_a_checkpoint_is_damaged(run: Path, which: int) -> None:
    checkpoint = sorted((run / "checkpoints").iterdir())[which]
    header = checkpoint / "state" / "snapshot.json"
    header.write_text(header.read_text().replace('"epoch": 3', '"epoch": 5'))
    with pytest.raises(StoreError, match=rf"{checkpoint.name} is damaged.*Nothing was deleted"):
        collect(str(run), print)
    assert generations(run / "state") == [1, 3, 4, 6]


def test_gc_of_a_copy_is_refused_while_the_run_is_alive(linked: tuple[Path, Path], tmp_path: Path) -> None:
    run, store = linked
    copied = shutil.copytree(run, tmp_path / "backup")
    lease = Lease(open_object_store(store), "the live run")
    lease.acquire()
    with pytest.raises(StoreError, match="the live run"):
        collect(str(copied), print)
    assert generations(store) == [1, 3, 4]
    lease.release()
    assert collect(str(copied), print) == [1]


def test_gc_of_an_old_copy_keeps_what_newer_checkpoints_refer_to(linked: tuple[Path, Path], tmp_path: Path) -> None:
    """Also if the continuing run is not alive at that moment."""
    run, store = linked
    shutil.copytree(store / "gen-000004", store / "gen-000007")
    copied = shutil.copytree(run, tmp_path / "backup")
    assert collect(str(copied), print) == [1]
    assert generations(store) == [3, 4, 7]


def test_gc_leaves_the_store_of_another_run_alone(linked: tuple[Path, Path], tmp_path: Path) -> None:
    run, store = linked
    copied = Path(shutil.copytree(run, tmp_path / "foreign"))
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**record, "id": "of another"}))
    with pytest.raises(StoreError, match=r"the store of another run .*nothing was deleted"):
        collect(str(copied), print)
    assert generations(store) == [1, 3, 4]


def test_gc_of_a_bare_store_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert store_command(["gc", str(run / "state")]) == 1
    assert "a store without its run" in capsys.readouterr().err


def test_convert_stops_when_its_lease_is_lost(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While copying, so that a client that takes over the destination is not overwritten."""
    write = Generations.write
    written: list[int] = []

    def taken_over(self: Generations, generation: int, lane: int, chunk: int, rows: Rows) -> int:
        written.append(chunk)
        if len(written) == 2:
            lease = self.objects.guard
            assert isinstance(lease, Lease)
            self.objects.delete("lease.json")
            open_object_store(tmp_path / "copy").put("lease.json", b"{}")
            lease._lost = "it was taken over"
        return write(self, generation, lane, chunk, rows)

    monkeypatch.setattr(Generations, "write", taken_over)
    with pytest.raises(StoreError, match="lost the lease"):
        convert(find(str(run)), str(tmp_path / "copy"), None)
    assert len(written) == 2 and open_object_store(tmp_path / "copy").get("lease.json") == b"{}"


@pytest.mark.parametrize("kind", ["directory", "run"])
def test_nothing_is_written_into_a_directory_that_is_not_a_store(run: Path, tmp_path: Path, kind: str) -> None:
    destination = run if kind == "run" else tmp_path / "thesis"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    before = sorted(destination.rglob("*"))
    with pytest.raises(StoreError, match="is not an x0-state store, and it is not empty"):
        convert(find(str(run)), str(destination), None)
    assert sorted(destination.rglob("*")) == before
    other = config.load_config(None, [*SETTINGS, f"store.url={tmp_path / 'thesis'}"])
    with pytest.raises(StoreError, match="is not an x0-state store, and it is not empty"):
        udddm.train(other, run_dir=tmp_path / "other", device="cpu")
    assert [path.name for path in (tmp_path / "thesis").iterdir() if not path.name.startswith(".")] == ["chapter"]
