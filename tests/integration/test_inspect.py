"""`udddm-store info`, `verify` and `view` on the store of a real, tiny run."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

import udddm
from udddm import config
from udddm.cli.store import main as store_command
from udddm.errors import StoreError
from udddm.storage.lease import Lease
from udddm.storage.local import LocalObjectStore
from udddm.store.generations import generation_name
from udddm.tools import inspect

SETTINGS = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.0, condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 50, batch_size: 128, ema: [0.99]}",  # three epochs of 15 steps, and five steps
    "checkpoint.every_steps=25",
    "sample.every_steps=0",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on each of two stores."""
    root = tmp_path_factory.mktemp("runs")
    for kind in ("zarr", "gpu"):
        udddm.train(config.load_config(None, [*SETTINGS, f"store.kind={kind}"]), run_dir=root / kind, device="cpu")
    return root


@pytest.fixture
def zarr_run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "zarr", tmp_path / "zarr"))


@pytest.fixture(params=["zarr", "gpu"])
def run(request: pytest.FixtureRequest, finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / request.param, tmp_path / request.param))


def store(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = store_command(list(arguments))
    return code, *capsys.readouterr()


def chunk_files(run: Path, generation: int) -> list[Path]:
    found = sorted(p for p in (run / "state" / generation_name(generation) / "c").rglob("*") if p.is_file())
    assert found
    return found


def test_info_describes_a_store(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = store(capsys, "info", str(run))
    assert code == 0
    assert "step-00000025: epoch 1, step 10" in out
    assert "step-00000050: epoch 3, step 5" in out
    if run.name == "zarr":
        assert "samples: 1797 of 1x8x8, fp16" in out
        assert "gen-000003: complete" in out
        assert "gen-000004: 0 of 4 lanes complete" in out
        assert "refers to gen-000003" in out
        own = store(capsys, "info", str(run / "state"))
        assert own[0] == 0
        assert "gen-000003: complete" in own[1]
    else:
        assert "and in the checkpoints" in out
        assert "all rows" in out


def test_an_intact_store_verifies(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, out, _ = store(capsys, "verify", str(run))
    assert code == 0
    assert "valid" in out
    assert "2 checkpoints" in out
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before  # nothing is written


@pytest.mark.parametrize("generation", [1, 2, 3, 4])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_verify_finds_a_corrupt_chunk(
    zarr_run: Path, capsys: pytest.CaptureFixture[str], generation: int, damage: str
) -> None:
    """Also in generation 4, which is incomplete, because the newest checkpoint refers to its first chunks."""
    path = chunk_files(zarr_run, generation)[0]
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[77] ^= 1
        path.write_bytes(data)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    lane, chunk = path.relative_to(zarr_run / "state" / generation_name(generation) / "c").parts[:2]
    code, out, _ = store(capsys, "verify", str(zarr_run))
    assert code == 1
    assert f"x0-state generation {generation}, lane {lane}, chunk {chunk} is damaged" in out
    assert out.count("is damaged") == 1


def test_verify_finds_a_missing_generation_that_a_checkpoint_needs(
    zarr_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(zarr_run / "state" / "gen-000003")
    code, out, _ = store(capsys, "verify", str(zarr_run))
    assert code == 1
    assert "checkpoint step-00000050" in out
    assert "generation 3, lane 0 is not complete" in out


def test_verify_finds_a_damaged_completion_record(zarr_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = zarr_run / "state" / "gen-000003" / "complete" / "lane-0002.json"
    record.write_text(record.read_text().replace('"lane": 2', '"lane": 1'))
    code, out, _ = store(capsys, "verify", str(zarr_run))
    assert code == 1
    assert str(record) in out


def test_verify_finds_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints" / "step-00000050" / "state" / "snapshot.json"
    file.write_bytes(file.read_bytes().replace(b"3", b"2", 1))
    code, out, _ = store(capsys, "verify", str(run))
    assert code == 1
    assert "checkpoint step-00000050" in out
    assert "snapshot.json does not match its checksum" in out


def test_view_draws_a_sample_across_the_generations(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures" / "view.png"
    code, text, _ = store(capsys, "view", str(run), "--sample", "1796", "--out", str(out))
    assert code == 0
    assert "the image" in text
    assert ("gen-000003" if run.name == "zarr" else "step-00000050") in text
    with Image.open(out) as picture:
        assert picture.width > 2 * 128


def test_the_estimates_are_those_of_the_store(run: Path) -> None:
    place = inspect.find(str(run))
    found = dict(inspect.estimates(place, 5))
    assert all(value.shape == (1, 8, 8) for value in found.values())
    assert list(found) == (
        ["gen-000001", "gen-000002", "gen-000003"] if run.name == "zarr" else ["step-00000025", "step-00000050"]
    )


@pytest.mark.parametrize("sample", ["1797", "-1"])
def test_a_sample_that_does_not_exist_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], sample: str, tmp_path: Path
) -> None:
    code, _, err = store(capsys, "view", str(run), f"--sample={sample}", "--out", str(tmp_path / "x.png"))
    assert code == 2
    assert "there is no sample" in err
    assert not (tmp_path / "x.png").exists()


def test_inspecting_a_location_without_a_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        store(capsys, "info", str(tmp_path / "nothing"))
    assert "does not exist" in capsys.readouterr().err
    code, _, err = store(capsys, "verify", str(tmp_path))
    assert code == 1
    assert "no x0-state store found" in err
    with pytest.raises(StoreError):
        inspect.find(str(tmp_path))


def test_an_unreadable_checkpoint_is_reported_and_does_not_hide_the_store(
    zarr_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sorted((zarr_run / "checkpoints").iterdir())[-1]
    (newest / "state" / "snapshot.json").write_text("{")
    code, out, _ = store(capsys, "verify", str(zarr_run))
    assert code == 1
    assert f"checkpoint {newest.name}" in out


def test_a_run_resumed_with_another_store_url_is_found_there(
    zarr_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (zarr_run / "result.json").unlink()
    shutil.rmtree(sorted((zarr_run / "checkpoints").iterdir())[-1])
    moved = tmp_path / "elsewhere"
    settings = [*SETTINGS, "store.kind=zarr", f"store.url={moved}"]
    udddm.train(config.load_config(None, settings), run_dir=zarr_run, device="cpu")
    code, out, _ = store(capsys, "info", str(zarr_run))
    assert code == 0 and f"store: {moved}" in out


def test_convert_refuses_a_destination_that_is_being_written(
    zarr_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease(LocalObjectStore(tmp_path / "copy"), "another run")
    lease.acquire()
    try:
        code, _, said = store(capsys, "convert", str(zarr_run), str(tmp_path / "copy"))
        assert code == 1 and "another run" in said
    finally:
        lease.release()
    assert store(capsys, "convert", str(zarr_run), str(tmp_path / "copy"))[0] == 0
    assert not (tmp_path / "copy" / "lease.json").exists()
