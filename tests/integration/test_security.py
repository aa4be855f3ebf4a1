"""An untrusted checkpoint or run is only data: it cannot make this process import code, open or write other files."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import udddm
from udddm.cli.command import FAILED, USAGE
from udddm.cli.evaluate import main as evaluate
from udddm.cli.sample import main as sample_command
from udddm.cli.store import main as store_command
from udddm.cli.train import main as train_command
from udddm.config import load_config
from udddm.config.plugins import load_plugin
from udddm.errors import CheckpointError, ConfigError, DataError, StoreError
from udddm.runs.checkpoint import corruption
from udddm.runs.manifest import dumps, parse
from udddm.runs.remote import RemoteCheckpoints
from udddm.storage import open_object_store
from udddm.storage.base import Oversized
from udddm.testing.s3 import BUCKET, S3Server
from udddm.urls import secret_in

SETTINGS = [
    "network={width: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.0, condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 4, batch_size: 32, ema: [0.9]}",
    "checkpoint.every_steps=4",
    "sample.every_steps=0",
    "store.kind=zarr",
]
MODULE = "from pathlib import Path\nfrom udddm.data.sources import digits\nPath(__file__ + '.ran').touch()\n"
MODULE += "def images(): return digits()\n"
MODULE += "def features(batch): return batch.flatten(1)[:, :8]\n"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    udddm.train(load_config(None, SETTINGS), run_dir=tmp_path / "theirs", device="cpu")
    return tmp_path / "theirs"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the module `stranger` creates when it is imported."""
    (tmp_path / "stranger.py").write_text(MODULE)
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("stranger", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "stranger.py.ran"


def rewrite(run: Path, **sections: Any) -> None:
    """Change the configuration of a run and its checkpoints, and update their manifests to match."""
    for path in [run / "run.json", *run.glob("checkpoints/*/config.json")]:
        found = json.loads(path.read_text())
        for name, values in sections.items():
            found["config"][name] |= values
        path.write_text(json.dumps(found))
        manifest = path.parent / "manifest.json"
        if manifest.exists():
            data = path.read_bytes()
            manifest.write_text(dumps(parse(manifest.read_bytes()) | {"config.json": entry(data)}))


def test_inspecting_an_untrusted_run_imports_nothing(
    theirs: Path, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(
        theirs,
        data={"name": "stranger:images"},
        evaluate={"features": "stranger:features", "every_steps": 1},
    )
    run, out = str(theirs), str(tmp_path / "out")
    scored = ["--checkpoint", run, "--count", "8", "--features", "mine:features", "--device", "cpu", "--cache", out]
    assert evaluate(scored) == USAGE
    said = capsys.readouterr().err
    assert "data.name=stranger:images" in said and "--trust" in said and "--set data.name=..." in said
    assert evaluate([*scored, "--set", "data.path=null"]) == USAGE
    assert sample_command(["--checkpoint", run, "--seeds", "0-3", "--out", out, "--device", "cpu"]) == 0
    for command in (["info", run], ["verify", run], ["convert", run, f"{out}/copy"]):
        assert store_command(command) == 0, command
    capsys.readouterr()
    assert store_command(["view", run, "--sample", "3", "--out", f"{out}/view.png"]) == 0
    shown = capsys.readouterr()
    assert "the image" not in shown.out and "omitted" in shown.err and "data.name=stranger:images" in shown.err
    assert not ran.exists()
    assert evaluate([*scored, "--set", "data.name=digits"]) == 0 and not ran.exists()
    assert evaluate([*scored, "--set", "data.name=mine:images"]) == 0 and not ran.exists()
    assert evaluate([*scored, "--trust"]) == 0 and ran.exists()
    assert store_command(["view", run, "--sample", "3", "--out", f"{out}/view.png", "--trust"]) == 0
    assert "the image" in capsys.readouterr().out


def test_a_path_from_an_untrusted_run_is_not_opened_but_the_users_is(
    theirs: Path, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.npy"
    np.save(secret, np.zeros((1797, 1, 8, 8), np.uint8))
    np.save(tmp_path / "mine.npy", np.zeros((1797, 1, 8, 8), np.uint8))
    rewrite(theirs, data={"name": "array", "path": str(secret)})
    scored = ["--checkpoint", str(theirs), "--count", "8", "--features", "mine:features", "--device", "cpu"]
    scored += ["--cache", str(tmp_path / "cache")]
    assert evaluate(scored) == USAGE
    assert f"data.path={secret}" in capsys.readouterr().err
    assert store_command(["view", str(theirs), "--sample", "3", "--out", str(tmp_path / "view.png")]) == 0
    assert "omitted" in capsys.readouterr().err
    assert evaluate([*scored, "--set", f"data.path={tmp_path / 'mine.npy'}"]) == 0


def test_arguments_from_an_untrusted_run_are_not_passed_to_a_users_function(
    theirs: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(theirs, data={"name": "stranger:images", "arguments": {"path": "/etc/passwd"}})
    scored = ["--checkpoint", str(theirs), "--features", "mine:features", "--device", "cpu", "--set"]
    assert evaluate([*scored, "data.name=mine:images"]) == USAGE
    assert "data.arguments.path=/etc/passwd" in capsys.readouterr().err


def test_a_run_evaluates_with_the_function_of_its_own_configuration(ran: Path, tmp_path: Path) -> None:
    own = [*SETTINGS, "data.name=mine:images", "evaluate={every_steps: 4, count: 8, features: mine:features}"]
    udddm.train(load_config(None, own), run_dir=tmp_path / "own", device="cpu")
    assert (tmp_path / "own" / "evaluation.jsonl").exists()


@pytest.mark.parametrize("name", ["os:path.join", "mine:features.__call__", "mine:", "mine:a b"])
def test_only_functions_defined_in_the_module_can_be_named(name: str, ran: Path) -> None:
    with pytest.raises(ConfigError, match=r"write package\.module:function"):
        load_plugin(name, "data set")


OUTSIDE = [
    "config/../../../../outside",
    "../outside",
    "state/../../outside",
    "/tmp/outside",
    "model.safetensors/../../outside",
    "..",
    ".",
    "",
    "state/",
    "state//rows",
    "state/./rows",
    "state\\..\\rows",
    "other/file",
    ".hidden",
]


def entry(data: bytes) -> dict[str, int]:
    return {"bytes": len(data), "crc32c": int(google_crc32c.value(data))}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_may_name_only_files_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c" / "step-00000001"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"config.json": entry(b"{}"), name: entry(b"")}))
    (path / "config.json").write_bytes(b"{}")
    problem = corruption(path)
    assert problem is not None and "manifest.json cannot be read: it names" in problem and repr(name) in problem
    objects = open_object_store(f"memory://{uuid.uuid4().hex}")
    objects.put("step-00000001/manifest.json", (path / "manifest.json").read_bytes())
    copies = tmp_path / "x" / "y" / "copies"
    kept = RemoteCheckpoints(copies, objects)
    problem = kept.corruption(kept.directory / "step-00000001")
    assert problem is not None and "it names" in problem
    assert {p.name for p in copies.rglob("*")} == {"checkpoints", "step-00000001", "manifest.json"}
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["y"]


@pytest.mark.parametrize(
    "bad", [b"[]", b"{", b'{"a": 3}', b'{"a": {"bytes": -1, "crc32c": 0}}', b'{"a": {"bytes": true, "crc32c": 0}}']
)
def test_a_malformed_manifest_is_an_error_without_a_traceback(bad: bytes) -> None:
    with pytest.raises(ValueError):
        parse(bad)
    with pytest.raises(ValueError, match="too deeply"):
        parse(b"[" * 100_000)
    with pytest.raises(ValueError, match="as a file and as the directory"):
        parse(json.dumps({"state/a": entry(b""), "state/a/b": entry(b"")}).encode())


def test_every_file_that_a_run_writes_is_a_name_that_a_manifest_may_hold(theirs: Path) -> None:
    names = parse((next(theirs.glob("checkpoints/*")) / "manifest.json").read_bytes())
    assert {"config.json", "model.safetensors", "state/snapshot.json", "state/lane-0000.json"} <= set(names)


@pytest.mark.parametrize("what", ["link", "linked directory", "pipe"])
def test_links_and_devices_in_a_checkpoint_are_corruption(theirs: Path, tmp_path: Path, what: str) -> None:
    path = next(theirs.glob("checkpoints/*"))
    assert corruption(path) is None
    target = path / ("state" if what == "linked directory" else "config.json")
    target.rename(tmp_path / "elsewhere")
    if what == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(tmp_path / "elsewhere")
    problem = corruption(path)
    assert problem is not None and target.name in problem and "plain file" in problem


class Site:
    """An untrusted web server that serves `pages` by path and announces the sizes in `announced`."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.announced: dict[str, int] = {}
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                return

            def do_HEAD(self) -> None:
                self._head()

            def do_GET(self) -> None:
                data = self._head()
                self.wfile.write(data)

            def _head(self) -> bytes:
                data = site.pages.get(self.path)
                self.send_response(404 if data is None else 200)
                if self.command == "HEAD":
                    self.send_header("Content-Length", str(site.announced.get(self.path, len(data or b""))))
                self.end_headers()
                return data or b""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    yield found
    found.close()


def put_at(site: Site, run: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Serve a checkpoint of `run` with a changed manifest, and return its URL."""
    path = next(run.glob("checkpoints/*"))
    for file in path.rglob("*"):
        if file.is_file():
            site.pages[f"/run/checkpoints/{path.name}/{file.relative_to(path)}"] = file.read_bytes()
    manifest: dict[str, Any] = parse((path / "manifest.json").read_bytes())
    change(manifest)
    site.pages[f"/run/checkpoints/{path.name}/manifest.json"] = dumps(manifest).encode()
    listing = f'<a href="{path.name}/">{path.name}</a>'.encode()
    site.pages |= {"/run/checkpoints": listing, "/run/checkpoints/": listing}
    site.pages[f"/run/checkpoints/{path.name}"] = b'<a href="manifest.json">manifest.json</a>'
    return f"{site.url}/run/checkpoints/{path.name}"


def test_a_web_server_writes_nothing_elsewhere(
    site: Site, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    sampling = ["--seeds", "0-3", "--device", "cpu", "--out", str(tmp_path / "out")]
    whole = put_at(site, theirs, lambda manifest: None)
    assert sample_command(["--checkpoint", whole, *sampling]) == 0
    name = f"config/../../../../{tmp_path.name}/bashrc"
    url = put_at(site, theirs, lambda manifest: manifest.update({name: entry(b"owned")}))
    site.pages["/run/checkpoints/bashrc"] = b"owned"
    assert sample_command(["--checkpoint", url, *sampling]) == FAILED
    assert name in capsys.readouterr().err
    assert not list(tmp_path.rglob("bashrc"))


def test_no_more_is_read_from_a_web_server_than_the_manifest_declares(
    site: Site, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = put_at(site, theirs, lambda manifest: None)
    key = url.removeprefix(site.url) + "/model.safetensors"
    size = len(site.pages[key])
    site.announced[key] = size  # different from the size that it sends
    site.pages[key] = bytes(40 << 20)
    for _ in range(2):
        assert sample_command(["--checkpoint", url, "--device", "cpu", "--out", str(tmp_path / "out")]) == FAILED
        assert f"model.safetensors cannot be read: it has more than its {size} bytes" in capsys.readouterr().err
        site.announced = {}


@pytest.mark.parametrize("kind", ["s3", "memory", "local"])
def test_a_download_ends_at_its_limit(kind: str, s3: S3Server, tmp_path: Path) -> None:
    names = {"s3": f"s3://{BUCKET}/limits", "memory": "memory://limits", "local": str(tmp_path / "objects")}
    objects = open_object_store(names[kind])
    objects.put("key", bytes(1000))
    objects.download("key", tmp_path / "file", 1000)
    assert (tmp_path / "file").stat().st_size == 1000
    with pytest.raises(Oversized, match="999"):
        objects.download("key", tmp_path / "other", 999)
    assert not (tmp_path / "other").exists()


SECRET = "wJalr/XUtnF/bPxRfiCY"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/run",
        f"s3:/AKIA:{SECRET}@bucket/run",
        f"https://user:{SECRET}@host/x.npy",
        f"https://host/x.npy?X-Amz-Signature={SECRET}",
        f"https://host/x.npy#token={SECRET}",
        f"simplecache::ftp://user:{SECRET}@host/x.npy",
        f"S3://AKIA:p@{SECRET}@bucket/run",
    ],
)
@pytest.mark.parametrize("key", ["store.url", "data.path", "train.init_from", "run_dir"])
def test_a_secret_in_a_url_is_refused_before_any_write_and_not_shown(
    url: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UDDDM_SCRATCH", str(tmp_path / "scratch"))
    arguments = [f"--set={one}" for one in SETTINGS] + ["--device=cpu"]
    arguments += [f"--run-dir={url}"] if key == "run_dir" else ["--run-dir=run", f"--set={key}={url}"]
    if key == "data.path":
        arguments.append("--set=data.name=array")
    assert train_command(arguments) == USAGE
    said = "".join(capsys.readouterr())
    assert key.replace("run_dir", "the run directory") in said and not list(tmp_path.iterdir())
    assert not any(part in said for part in SECRET.split("/"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://user:{SECRET}@host/x.npy?a={SECRET}", "https://***@host/x.npy?***"),
        (f"s3://AKIA:{SECRET}@bucket", "s3://***@bucket"),
        (f"s3://{SECRET.replace('/', '')}@bucket/a", "s3://***@bucket/a"),
        ("abfs://container@account.dfs.core.windows.net/run", None),
        ("s3://bucket/run@2024/x", None),
        ("sftp://user@host/run", None),
        ("/data/a?b#c@d:e", None),
        ("file:///data/a:b@c?d", None),
        ("https://host:8080/x.npy", None),
    ],
)
def test_messages_show_urls_without_their_secrets(url: str, shown: str | None) -> None:
    assert secret_in(url) == "" if shown is None else secret_in(url)
    for error in (ConfigError, DataError, StoreError, CheckpointError):
        assert str(error(f"cannot read '{url}' now")) == f"cannot read '{shown or url}' now"


def test_a_message_about_a_path_with_a_secret_does_not_show_it(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"{site.url}/nothing.npy?signature={SECRET}"
    assert train_command([f"--set=data={{name: array, path: '{path}'}}", "--dry-run"]) != 0
    said = "".join(capsys.readouterr())
    assert "nothing.npy" in said and "XUtnF" not in said
    assert sample_command(["--checkpoint", f"s3://AKIA:{SECRET}@bucket/run", "--out", str(tmp_path)]) == FAILED
    assert "XUtnF" not in "".join(capsys.readouterr())


def test_a_manifest_with_a_lost_or_renamed_entry_is_corrupt(theirs: Path) -> None:
    path = next(theirs.glob("checkpoints/*"))
    manifest = path / "manifest.json"
    text = manifest.read_text()
    entries = json.loads(text)
    assert len(entries) > 5
    for name in [name for name in entries if name != "manifest.json"]:
        for other in ({}, {"config.json" if name != "config.json" else "model.safetensors": entries[name]}):
            kept = {k: v for k, v in entries.items() if k != name} | other
            manifest.write_text(json.dumps(kept))
            assert "its own checksum" in str(corruption(path)), name
    manifest.write_text("{}")
    assert "names no file" in str(corruption(path))
    manifest.write_text(text)
    assert corruption(path) is None
    manifest.write_text(json.dumps(parse(text.encode())))  # from a version whose manifests had no checksum
    assert corruption(path) is None


HEADERS: dict[str, list[object]] = {
    "form": ["forn", None, []],
    "url": [3],
    "epoch": [-1, "1", None, 1.5],
    "step": [True, -1],
    "dtype": ["fp8", None],
    "shape": [[], [0], "1x8x8", [1, 8, 8.0]],
    "order": [None, {}, {"lanes": 0}, {"chunk": "x"}],
}


@pytest.mark.parametrize("key", HEADERS)
def test_a_malformed_snapshot_is_an_error_that_names_it(
    key: str, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(theirs.glob("checkpoints/*/state")) / "snapshot.json"
    header = json.loads(path.read_text())
    for value in HEADERS[key]:
        changed = value if not (key == "order" and value) else header["order"] | value  # type: ignore[operator]
        path.write_text(json.dumps(header | {key: changed}))
        for command in (["info"], ["verify"], ["view", "--sample=1", f"--out={tmp_path}/x.png"]):
            code = store_command([command[0], str(theirs), *command[1:]])
            said = "".join(capsys.readouterr())
            passes = command[0] != "verify" and (key == "order" or command[0] == "view")  # the store suffices
            assert code == FAILED or passes, (command, value, said)
            assert "snapshot.json" in said or passes, (command, value, said)
        assert store_command(["convert", str(theirs), str(tmp_path / "copy")]) == FAILED
        assert "snapshot.json" in capsys.readouterr().err


@pytest.mark.parametrize("attributes", [{"order": {"lanes": 0}}, {"order": 3}, {"dtype": "x"}, {"shape": 3}])
def test_a_malformed_store_is_an_error_that_names_it(
    attributes: dict[str, Any], theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = theirs / "state" / "zarr.json"
    found = json.loads(path.read_text())
    for key, value in attributes.items():
        old = found["attributes"][key]
        found["attributes"][key] = old | value if isinstance(value, dict) else value
    path.write_text(json.dumps(found))
    assert store_command(["info", str(theirs / "state")]) == FAILED
    assert "zarr.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", "[" * 100_000, '{"config": {}}', "{"])
@pytest.mark.parametrize("name", ["config.json", "run.json", "position.json"])
def test_malformed_json_is_an_error_that_names_its_file(
    name: str, text: str, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = next(theirs.glob("checkpoints/*"))
    path = theirs / name if name == "run.json" else checkpoint / name
    path.write_text(text)
    (checkpoint / "manifest.json").write_text(
        dumps(parse((checkpoint / "manifest.json").read_bytes()) | {name: entry(text.encode())})
    ) if name != "run.json" else None
    (theirs / "result.json").unlink()
    if name == "config.json":
        code = sample_command(["--checkpoint", str(theirs), "--out", str(tmp_path / "out"), "--device", "cpu"])
    else:
        code = train_command([f"--run-dir={theirs}", "--device=cpu", *[f"--set={one}" for one in SETTINGS]])
    assert code in (FAILED, USAGE)
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("shape", [[], [1, 8], [1, 8, 0], [1, 8, "8"], None, [1, 8, 10**9], [1, 8, True]])
def test_an_impossible_image_shape_is_an_error(shape: object, theirs: Path) -> None:
    path = next(theirs.glob("checkpoints/*")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": shape}))
    (path.parent / "manifest.json").unlink()  # as in a release
    with pytest.raises(CheckpointError, match=r"config.json: its shape is"):
        udddm.load_model(path.parent)


def test_weights_that_are_not_finite_are_not_sampled(theirs: Path) -> None:
    path = next(theirs.glob("checkpoints/*"))
    weights = load_file(path / "ema-0.9.safetensors")
    list(weights.values())[3].view(-1)[0] = float("nan")
    save_file(weights, path / "ema-0.9.safetensors")
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="are not all finite"):
        udddm.load_model(path)
    assert np.isfinite(udddm.sample(udddm.load_model(path, ema="none"), [0])).all()


@pytest.mark.parametrize("rows", [np.array([Path()], dtype=object), np.zeros((3, 1, 8, 8), np.float64)])
def test_rows_of_the_state_that_are_something_else_are_refused(
    theirs: Path, rows: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = max((theirs / "checkpoints").iterdir())
    path = next(checkpoint.glob("state/lane-*-window-*.npy"))
    np.save(path, rows, allow_pickle=True)
    manifest = checkpoint / "manifest.json"
    name = str(path.relative_to(checkpoint))
    manifest.write_text(dumps(parse(manifest.read_bytes()) | {name: entry(path.read_bytes())}))
    for command in (["verify", str(theirs)], ["convert", str(theirs), str(tmp_path / "copy")]):
        assert store_command(command) == FAILED
        said = capsys.readouterr()
        assert str(path) in said.out + said.err
