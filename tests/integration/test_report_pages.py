"""`udddm report` on real runs, at a URL, at the end of training, and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from udddm.cli.report import main as report_command
from udddm.cli.train import main as train_command
from udddm.testing.s3 import BUCKET, S3Server
from udddm.tools import report

TINY = [
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], condition: none, "
    "classes: 10, dropout: 0}",
    "objective={name: ict, pretrain: 0, refined: {share: 0.5}}",
    "train={steps: 60, batch_size: 64, learning_rate: 1.0e-3, ema: [0.9]}",
    "checkpoint={every_steps: 20, keep: 3}",
    "sample={every_steps: 20, final: 16}",
    "log_every_steps=5",
    "store.kind=zarr",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with the report that training wrote."""
    where = tmp_path_factory.mktemp("report") / "first run"
    assert train_command(["--device", "cpu", "--run-dir", str(where), *TINY]) == 0
    return where


def values(page: Path) -> list[dict[str, object]]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    runs: list[dict[str, object]] = json.loads(found[1])["runs"]
    return runs


def test_training_ends_with_a_report(run: Path) -> None:
    (found,) = values(run / "report.html")
    assert found["status"] == "finished: 60 steps"
    assert [grid["evaluations"] for grid in found["grids"]] == [1, 2, 4]  # type: ignore[attr-defined]
    assert len(found["film"]) == 3 and len(found["state"]) >= 1  # type: ignore[arg-type]
    assert len(found["levels"]["frames"]) > 5  # type: ignore[index]


def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(report, "write", fail)
    assert train_command(["--device", "cpu", "--run-dir", str(tmp_path / "run"), *TINY, "train.steps=2"]) == 0
    assert "no report of the run was written: OSError: no space" in capsys.readouterr().err


def test_runs_side_by_side_and_at_a_url(run: Path, s3: S3Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/report/run"
    assert train_command(["--device", "cpu", "--run-dir", url, *TINY, "train.steps=20"]) == 0
    out = tmp_path / "both.html"
    assert report_command([str(run), url, "--out", str(out), "--device", "cpu"]) == 0
    first, second = values(out)
    assert (first["name"], second["name"]) == ("first run", "run") and second["grids"]


def chromium(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={page.parent}/browser", "--virtual-time-budget=4000", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("count", [1, 2])
def test_a_browser_draws_the_page_without_an_error(run: Path, tmp_path: Path, count: int) -> None:
    """Sliders and the film are moved by a script that is added to the page."""
    page = tmp_path / "page.html"
    report.write([run] * count, page, device="cpu")
    moving = """<script>
      const sources = () => [...document.querySelectorAll("input")].map((i) => i.closest("section").querySelector(".slider + img").src);
      const before = sources();
      document.querySelectorAll("input").forEach((i) => { i.value = 0; i.dispatchEvent(new Event("input")); });
      const after = sources();
      document.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", { clientX: 100, clientY: 100 }));
      document.querySelector("button").click();
      document.body.dataset.moved = before.filter((source, i) => source !== after[i]).length;
      document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
    </script></body>"""  # noqa: E501
    page.write_text(page.read_text().replace("</body>", moving))
    for size in ("390,900", "1280,900"):
        done = chromium(page, f"--window-size={size}", "--dump-dom")
        assert not re.findall(r".*(?:CONSOLE|Uncaught).*", done.stderr), done.stderr[-2000:]
        dom = done.stdout
        moved = re.search(r'data-moved="(\d+)"', dom)
        assert moved and int(moved[1]) == 3 * count, dom[-500:]
        assert 'data-wide="false"' in dom
        assert dom.count("<svg") >= 6 and dom.count("<img") >= 7 * count and ">Stop<" in dom
