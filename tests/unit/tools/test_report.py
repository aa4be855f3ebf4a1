"""Reports: the values read from a run's files, and the page, which is self-contained and escapes its text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from udddm import config as configuration
from udddm.data import ArrayImages, ImageDataset
from udddm.errors import ConfigError
from udddm.runs.run import check_or_record
from udddm.tools import report
from udddm.tools.report import values

SETTINGS = [
    "objective={name: ict, pretrain: 0.5}",
    "train={steps: 40, batch_size: 8}",
    "order={lanes: 2}",
]


def recorded(run: Path, *settings: str) -> Path:
    """A run directory with a configuration, and nothing trained."""
    run.mkdir(parents=True)
    config = configuration.load_config(None, [*SETTINGS, *settings])
    check_or_record(run, config, ImageDataset(ArrayImages(torch.zeros(16, 1, 8, 8).numpy())))
    return run


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')  # a line not yet whole


def row(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "images": step * 8, "loss": 1.0, "images_per_second": 5.0, **values}


def test_a_run_that_was_not_trained_has_a_report(tmp_path: Path) -> None:
    found = report.collect(recorded(tmp_path / "run"))
    assert found["status"] == "not trained yet" and found["grids"] == [] and "No samples" in found["notes"][0]
    assert "train:" in found["config"]


def test_curves_scores_phases_and_resumes(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    rows = [row(step, elapsed_seconds=float(step if step <= 20 else step - 20)) for step in range(1, 41)]
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "evaluation.jsonl", [{"step": 20, "fd": 3.0, "evaluations": 1}, {"step": 40, "fd": float("nan")}])
    found = report.collect(run, images=False)
    assert found["status"] == "step 40 of 40"
    assert found["metrics"]["images"] == [8.0 * step for step in range(1, 41)]
    assert found["resumed"] == [160.0]
    assert found["scores"] == [{"images": 160.0, "evaluations": 1, "fd": 3.0}, {"images": 320.0, "evaluations": 1}]
    assert found["phases"][0] == {"images": 0, "text": "a denoiser (EDM)"}
    assert found["phases"][1]["images"] == 160 and "iCT" in found["phases"][1]["text"]
    assert ("fd, last and best", "3, 3") in found["facts"]


def test_the_loss_has_a_curve_for_each_band_of_the_noise_level(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    rows = [row(1, loss_sigma_above_5=0.5), row(2, loss_sigma_above_5=0.25, **{"loss_sigma_below_0.2": 4.0})]
    write_lines(run / "metrics.jsonl", rows)
    curves = report.collect(run, images=False)["metrics"]
    assert curves["loss_sigma_above_5"] == [0.5, 0.25] and curves["loss_sigma_below_0.2"] == [None, 4.0]


def test_a_long_curve_shows_means_of_neighbors(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [{**row(step), "loss": float(step % 2)} for step in range(1, 4001)])
    curves = report.collect(run, images=False)["metrics"]
    assert len(curves["loss"]) <= values.POINTS and set(curves["loss"]) == {0.5}
    assert curves["step"][-1] == 4000


def test_a_page_needs_nothing_else_and_shows_text_as_text(tmp_path: Path) -> None:
    run = recorded(tmp_path / "</script><img src=x onerror=alert(1)>")
    write_lines(run / "metrics.jsonl", [row(1)])
    found = report.collect(run, images=False)
    found["name"] = "</script><b>"
    found["notes"] = ["<!--"]
    page = report.page([found])
    assert page.count("</script>") == 2 and "<b>" not in page and page.count("<!--") == 0
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data and json.loads(data[1])["runs"][0]["name"] == "</script><b>"


def test_an_objective_of_someone_else_is_not_imported(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    file = json.loads((run / "run.json").read_text())
    file["config"]["objective"]["name"] = "nowhere.module:factory"
    (run / "run.json").write_text(json.dumps(file))
    assert report.collect(run, images=False)["phases"] == []


def test_what_is_not_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run: it has no run\.json"):
        report.collect(tmp_path)


def test_the_film_has_at_most_so_many_frames(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    (run / "samples").mkdir()
    for step in range(1, 61):
        (run / "samples" / f"step-{step:08d}.png").write_bytes(b"png")
    film = report.collect(run, images=False)["film"]
    assert len(film) == values.FRAMES and (film[0]["step"], film[-1]["step"]) == (1, 60)
    assert film[0]["images"] == 8 and film[0]["src"].startswith("data:image/png;base64,")
